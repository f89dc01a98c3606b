"""A planned module on disk, and back: packed weights, and nothing of the original's.

What: the state of a planned module is written as it is, frozen layers with their packed weights and
scales, everything else in the smallest type that loses nothing (a checkpoint of bfloat16 was read
as float32 to be compared, and goes back). Reading it, layers are frozen straight from what is
stored: no weight is rounded again, and none is ever there in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vcompress.compress.frozen import FrozenConvolution, FrozenLayer, FrozenLinear
from vcompress.compress.numerics import hadamard
from vcompress.compress.prepare import Prepared, checked_layer
from vcompress.compress.tensors import WEIGHT_PREFIX
from vcompress.models.checkpoint import read_safetensors
from vcompress.models.empty import fill_module
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import LayerChoice

__all__ = ["freeze_stored", "restore_module", "save_module"]

# In the order of preference; float32 always fits.
_SMALL_TYPES = (torch.bfloat16, torch.float16)
_MARKER = "type_marker"


def save_module(module: nn.Module, path: Path) -> None:
    """Write the state of a planned `module` to the safetensors file `path`."""
    exact = set(_kept_in_float32(module))
    frozen = {name for name, each in module.named_modules() if isinstance(each, FrozenLayer)}
    state: dict[str, torch.Tensor] = {}
    free: list[str] = []
    for name, tensor in module.state_dict().items():
        layer, _, part = name.rpartition(".")
        if part == _MARKER:
            continue
        # Of equal storage safetensors takes one alone.
        state[name] = tensor.detach().cpu().clone().contiguous()
        if layer not in frozen and tensor.is_floating_point() and name not in exact:
            free.append(name)
    small = _lossless([state[name] for name in free])
    for name in free:
        state[name] = state[name].to(small)
    save_file(state, path, metadata={"dtype": str(small).removeprefix("torch.")})


def _kept_in_float32(module: nn.Module) -> Iterable[str]:
    """Parameters that the class wants in float32 whatever the rest is in."""
    parts = getattr(module, "_keep_in_fp32_modules", None) or ()
    return (name for name, _ in module.named_parameters() if set(name.split(".")) & set(parts))


def _lossless(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The smallest type in which all of `tensors` are what they are."""
    tensors = list(tensors)
    for dtype in _SMALL_TYPES:
        if all(torch.equal(each.to(dtype).to(each.dtype), each) for each in tensors):
            return dtype
    return torch.float32


def restore_module(
    module: nn.Module, choices: Mapping[str, LayerChoice], path: Path
) -> torch.dtype:
    """Fill `module`, made by `models.empty`, with what `save_module` wrote to `path`, in place.

    Args:
        choices: of the plan; layers that are not kept become frozen ones.

    Returns:
        The type that what is not frozen is stored in, and that the module computes in.

    Raises:
        InputError: the file does not fit the module and the plan.
    """
    state, metadata = read_safetensors(path)
    name = metadata.get("dtype", "")
    known = {str(each).removeprefix("torch."): each for each in (*_SMALL_TYPES, torch.float32)}
    if name not in known:
        message = f"{path}: its metadata must name one of {', '.join(known)}, got {name!r}"
        raise InputError(message)
    freeze_stored(module, choices, state, str(path))
    for key, tensor in module.state_dict().items():
        if key.rpartition(".")[2] == _MARKER:
            state[key] = tensor.to(known[name])
    fill_module(module, state, str(path))
    return known[name]


def freeze_stored(
    module: nn.Module, choices: Mapping[str, LayerChoice], state: Mapping[str, torch.Tensor],
    where: str,
) -> None:  # fmt: skip
    """Put a frozen layer, made of its parts in `state`, in the place of every layer not kept.

    Raises:
        InputError: a layer is not there, or lacks parts.
    """
    for name, choice in choices.items():
        if choice.format == FLOAT:
            continue
        try:
            layer = module.get_submodule(name)
        except AttributeError as error:
            message = f"{where}: the plan's layer {name} is no part of {type(module).__name__}"
            raise InputError(message) from error
        frozen = _frozen(layer, choice, state, name, where)
        # A layer that is used in several places stands in the plan by one of its names.
        for place, each in list(module.named_modules(remove_duplicate=False)):
            if each is layer:
                parent, _, child = place.rpartition(".")
                setattr(module.get_submodule(parent), child, frozen)


def _frozen(
    layer: nn.Module, choice: LayerChoice, state: Mapping[str, torch.Tensor], name: str, where: str
) -> FrozenLayer:
    checked = checked_layer(layer, choice.format, name)
    beginning = f"{name}."
    parts = {
        key.removeprefix(beginning): tensor
        for key, tensor in state.items()
        if key.startswith(beginning)
    }
    weight = {part: tensor for part, tensor in parts.items() if part.startswith(WEIGHT_PREFIX)}
    if not weight:
        message = f"{where} has no stored weight of {name}; make the artifact again"
        raise InputError(message)
    down, up = parts.get("low_rank_down"), parts.get("low_rank_up")
    prepared = Prepared(
        weight=weight,
        input_scale=parts.get("input_scale"),
        input_smoothing=parts.get("input_smoothing"),
        low_rank=None if down is None or up is None else (down, up),
        rotation=None if choice.rotation is None else hadamard.matrix(choice.rotation),
        bias=parts.get("bias"),
    )
    if isinstance(checked, nn.Linear):
        return FrozenLinear(prepared, choice.format)
    return FrozenConvolution(checked, prepared, choice.format)
