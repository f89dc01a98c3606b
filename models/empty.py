"""A diffusers module from its configuration alone, whose large tensors take no memory.

What diffusers allocates with `torch.empty` (the weights of linear layers, convolutions and
embeddings) goes to the meta device; what it computes (tables of positions) is there. Weights are
put in place afterwards, packed or not, or never, where only the structure is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vcompress.models.checkpoint import read_safetensors
from vcompress.spec import strict_json
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["diffusers_class", "empty_module", "fill_module", "read_weights"]

_WEIGHTS = "diffusion_pytorch_model"
_SHOWN = 5
_ALIGNMENT = 64  # bytes, as torch allocates


class _NoMemory(TorchFunctionMode):
    """Within it, `torch.empty` makes tensors without memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def diffusers_class(name: str) -> Any:
    """The class `name` of diffusers.

    Raises:
        MissingCapabilityError: diffusers is not installed.
        InputError: it has no such class.
    """
    try:
        import diffusers
    except ImportError as error:
        message = "this is a diffusers model: pip install 'vcompress-ai[hf]'"
        raise MissingCapabilityError(message) from error
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        message = f"diffusers {diffusers.__version__} has no model class {name}"
        raise InputError(message)
    return found


def empty_module(config: Mapping[str, Any]) -> nn.Module:
    """A module of the class and configuration of a diffusers `config.json`, in evaluation mode.

    Raises:
        InputError: the configuration does not make one.
        MissingCapabilityError: diffusers is not installed.
    """
    cls = diffusers_class(str(config.get("_class_name")))
    try:
        with _NoMemory():
            module: nn.Module = cls.from_config(dict(config))
    except Exception as error:
        # The library checks little itself and stumbles over wrong values, each in its own way.
        message = f"the configuration does not make a {cls.__name__}: {error}"
        raise InputError(message) from error
    return module.eval().requires_grad_(False)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that diffusers saved in `folder`, in one file of safetensors or in several.

    Raises:
        InputError: there are none, or a file is missing or damaged.
    """
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        data = strict_json.read(index)
        listed = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(listed, dict):
            message = f"{index} must hold a weight_map; download the model again"
            raise InputError(message)
        # A name that leaves the folder is none that diffusers wrote.
        files = [folder / Path(str(name)).name for name in dict.fromkeys(listed.values())]
    else:
        files = [folder / f"{_WEIGHTS}.safetensors"]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.is_file():
            message = (
                f"{file} is missing; give a folder with all weights as safetensors, as "
                "save_pretrained of diffusers writes it"
            )
            raise InputError(message)
        weights |= read_safetensors(file)[0]
    return weights


def fill_module(module: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Put `weights` into a module of `empty_module`, in place.

    They are copied only where they are not aligned in memory, as in a file: kernels work on such
    numbers in another order, and the last bits of the result would depend on the file's header.

    Raises:
        InputError: weights are missing, unknown or of another shape.
    """
    own = module.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"{name} is unknown{strict_json.nearest(name, expected)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {expected[name]}")
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        message = f"{where}: the weights do not fit {type(module).__name__}: {shown}{more}"
        raise InputError(message)
    aligned = {
        name: tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
        for name, tensor in weights.items()
    }
    module.load_state_dict(aligned, assign=True)
    module.requires_grad_(False)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        # None of the classes of diffusers that were tried does this.
        message = f"{where}: {left[0]} of {type(module).__name__} is neither stored nor computed"
        raise InputError(message)
