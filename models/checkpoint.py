"""Read a checkpoint file without running code from it.

Accepted: safetensors, and `.pt` files that torch reads with `weights_only=True`. A checkpoint of
vcompress is a dictionary `{"family", "config", "state_dict"}`, perhaps with `labels` and `clip`
(see `spec.clip.ClipSpec`); in safetensors the same facts stand in the header's metadata. A bare
state dict needs `--arch module:callable`. A pickled module is code: only with `--trust-pickle`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError
from vcompress.spec.files import check_model

__all__ = [
    "Checkpoint",
    "check_finite",
    "load_state",
    "metadata_of",
    "read_checkpoint",
    "read_safetensors",
]

_MAX_HEADER_BYTES = 100 * 2**20
_MAX_TENSORS = 50_000


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file held: `state_dict`, or a whole pickled `module`; `family` "" if unknown."""

    family: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    state_dict: Mapping[str, torch.Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    clip: Mapping[str, Any] | None = None
    module: nn.Module | None = None


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Read the file `path`; `InputError` says what is wrong with it and what to do."""
    if not path.is_file():
        check_model(str(path))
        message = f"{path} is not a regular file; give one"
        raise InputError(message)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return _from_metadata(tensors, metadata, path)
    data = _torch_load(path, trust_pickle=trust_pickle)
    if isinstance(data, nn.Module):
        return Checkpoint(module=data)
    if not isinstance(data, Mapping):
        message = f"{path} holds a {type(data).__name__}, not a checkpoint or a state dict"
        raise InputError(message)
    if "state_dict" in data:
        return _from_dictionary(data, path)
    return Checkpoint(state_dict=_tensors_only(data, path))


def _torch_load(path: Path, *, trust_pickle: bool) -> Any:
    if path.stat().st_size == 0:
        message = f"{path} is empty: it was not written to its end"
        raise InputError(message)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            message = f"{path} is corrupt: {_first_line(error)}"
        else:
            message = (
                f"{path} is not a plain file of tensors: it is corrupt, or a pickled Python "
                "object, which can run any code when it is loaded. If you trust who made it, add "
                "--trust-pickle; better, save model.state_dict() and name the class with "
                "--arch module:callable"
            )
        raise InputError(message) from error
    except Exception as error:
        message = (
            f"{path} is not a PyTorch file, or it is damaged ({_first_line(error)}); save one with "
            "torch.save"
        )
        raise InputError(message) from error


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _tensors_only(data: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    wrong = [str(key) for key, value in data.items() if not isinstance(value, torch.Tensor)]
    if wrong or not data:
        message = (
            f"{path} is not a state dict: {wrong[0] if wrong else 'it is empty'} is not a tensor; "
            "save {'family', 'config', 'state_dict'} or model.state_dict()"
        )
        raise InputError(message)
    return {str(key): value for key, value in data.items()}


def _from_dictionary(data: Mapping[Any, Any], path: Path) -> Checkpoint:
    optional = ("family", "config", "labels", "clip", "epoch", "optimizer", "step")
    strict_json.check_keys(dict(data), required=("state_dict",), optional=optional, where=str(path))
    if not isinstance(data["state_dict"], Mapping):
        message = f"{path}: state_dict must be a dictionary of tensors"
        raise InputError(message)
    return _described(
        _tensors_only(data["state_dict"], path), path, family=str(data.get("family", "")),
        config=data.get("config", {}), labels=data.get("labels", ()), clip=data.get("clip"),
    )  # fmt: skip


def _described(
    tensors: dict[str, torch.Tensor],
    path: Path,
    *,
    family: str,
    config: Any,
    labels: Any,
    clip: Any,
) -> Checkpoint:
    if not isinstance(config, Mapping) or not isinstance(clip, Mapping | None):
        message = f"{path}: config and clip must be dictionaries, got {config!r} and {clip!r}"
        raise InputError(message)
    if not isinstance(labels, list | tuple):
        message = f"{path}: labels must be a list of class names, got {labels!r}"
        raise InputError(message)
    return Checkpoint(
        family=family, config=dict(config), state_dict=tensors,
        labels=tuple(str(label) for label in labels), clip=clip,
    )  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, its header checked first.

    The library accepts a header that names a tensor twice; here that is an error.
    """
    from safetensors.torch import load_file

    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
                message = f"{path} is not a safetensors file: its header length is {length} bytes"
                raise InputError(message)
            header = strict_json.parse(stream.read(length).decode("utf-8"), f"{path}: header")
        if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
            message = f"{path}: header must be an object of at most {_MAX_TENSORS} tensors"
            raise InputError(message)
        return load_file(path), dict(header.get("__metadata__", {}))
    except InputError:
        raise
    except Exception as error:
        message = f"{path} is corrupt or not a safetensors file: {_first_line(error)}"
        raise InputError(message) from error


def _from_metadata(
    tensors: dict[str, torch.Tensor], metadata: Mapping[str, str], path: Path
) -> Checkpoint:
    def field_of(name: str, default: Any) -> Any:
        return strict_json.parse(metadata[name], f"{path}: {name}") if name in metadata else default

    return _described(
        tensors, path, family=metadata.get("family", ""), config=field_of("config", {}),
        labels=field_of("labels", ()), clip=field_of("clip", None),
    )  # fmt: skip


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Header metadata from which `read_checkpoint` rebuilds `checkpoint`."""
    return {
        "family": checkpoint.family,
        "config": json.dumps(dict(checkpoint.config)),
        "labels": json.dumps(list(checkpoint.labels)),
        "clip": json.dumps(None if checkpoint.clip is None else dict(checkpoint.clip)),
    }


def load_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], where: str) -> None:
    """Load `state_dict` into `module`; an `InputError` lists every difference."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    for name, tensor in state_dict.items():
        if name not in expected:
            problems.append(f"unexpected {name}{strict_json.nearest(name, expected)}")
        elif tensor.shape != expected[name].shape:
            problems.append(
                f"{name} has shape {tuple(tensor.shape)}, the model has "
                f"{tuple(expected[name].shape)}"
            )
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        message = f"{where} does not fit the architecture:\n  {shown}{more}"
        raise InputError(message)
    module.load_state_dict(dict(state_dict))


def check_finite(module: nn.Module, where: str) -> None:
    """An `InputError` that names the tensors of `module` that hold NaN or infinity."""
    bad = [
        name
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())
    ]
    if bad:
        message = (
            f"{where}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}; "
            "training diverged or the file is damaged, use another checkpoint"
        )
        raise InputError(message)
