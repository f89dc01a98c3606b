"""The file of recorded calls: what `record_calls` writes and everything else reads.

A `.pt` file that torch reads with `weights_only=True`: a dictionary with the class of the module,
what all calls share, and one entry a call. Equal tensors (the text of all steps) are stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vcompress.models.calls import Call, content_of
from vcompress.spec import strict_json
from vcompress.spec.errors import InputError

__all__ = ["CallFile", "RecordedCall", "holds_calls", "read_calls", "write_calls"]

_KIND = "vcompress calls"
_HOW = "record them with: with vcompress.record_calls(pipe.transformer, 'calls.pt'): pipe(...)"


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedCall:
    """One call and where it stands.

    Attributes:
        call: all of its samples.
        generation: which run of the pipeline, from 0.
        step: of this generation, from 0.
        branch: of this step, from 0: with guidance a model is called twice.
    """

    call: Call
    generation: int
    step: int
    branch: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CallFile:
    """Recorded calls, at least one, all of the same shapes, of a module of class `module_class`."""

    module_class: str
    calls: Sequence[RecordedCall]


def write_calls(path: Path, module_class: str, calls: Sequence[RecordedCall]) -> None:
    """Write `calls`, which must fit together, to `path`.

    Raises:
        InputError: no call, calls that differ in more than their samples, or `path` is no place.
    """
    _check_alike(calls, str(path))
    kept: dict[tuple[Any, ...], torch.Tensor] = {}
    first = calls[0].call
    data = {
        "kind": _KIND,
        "schema": 1,
        "module_class": module_class,
        "shared": dict(first.shared),
        "constants": dict(first.constants),
        "calls": [
            {
                "tensors": {name: _once(each, kept) for name, each in one.call.tensors.items()},
                "generation": one.generation, "step": one.step, "branch": one.branch,
            }
            for one in calls
        ],
    }  # fmt: skip
    try:
        torch.save(data, path)
    except (OSError, RuntimeError) as error:
        message = f"{path} cannot be written: {error}; choose another place"
        raise InputError(message) from error


def _once(tensor: torch.Tensor, kept: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """The tensor with this content that was seen first: torch stores one tensor once."""
    digest = hashlib.sha256(content_of(tensor)).digest()
    return kept.setdefault((digest, tensor.dtype, tuple(tensor.shape)), tensor.contiguous())


def read_calls(path: Path) -> CallFile:
    """The calls in the file `path`.

    Raises:
        InputError: no such file, or not a file of calls.
    """
    if not path.is_file():
        message = f"{path}: no such file of recorded calls; {_HOW}"
        raise InputError(message)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises nearly any type on a damaged or hostile file
        message = f"{path} is not a file of recorded calls; {_HOW}"
        raise InputError(message) from error
    if not isinstance(data, Mapping) or data.get("kind") != _KIND:
        message = (
            f"{path} holds no recorded calls, and this model takes several tensors, not clips; "
            f"{_HOW}"
        )
        raise InputError(message)
    try:
        calls = [_read_one(one, data) for one in data["calls"]]
        module_class = str(data["module_class"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{path} is not a file of recorded calls of this version; record them again"
        raise InputError(message) from error
    _check_alike(calls, str(path))
    return CallFile(module_class=module_class, calls=calls)


def holds_calls(path: Path) -> bool:
    """Whether `path` is a file of recorded calls; their tensors are not read."""
    try:
        data = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # torch raises nearly any type on a file that is none of its own
        return False
    return isinstance(data, Mapping) and data.get("kind") == _KIND


def _read_one(one: Mapping[str, Any], data: Mapping[str, Any]) -> RecordedCall:
    strict_json.check_keys(one, required=("tensors", "generation", "step", "branch"), where="calls")
    for tensor in (*one["tensors"].values(), *data["shared"].values()):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError
    call = Call(
        tensors=dict(one["tensors"]), shared=dict(data["shared"]),
        constants=dict(data["constants"]),
    )  # fmt: skip
    return RecordedCall(
        call=call, generation=int(one["generation"]), step=int(one["step"]),
        branch=int(one["branch"]),
    )  # fmt: skip


def _check_alike(calls: Sequence[RecordedCall], where: str) -> None:
    """Raise `InputError` unless there are calls, and they differ in their samples alone."""
    if not calls:
        message = f"{where}: at least one call is needed, got none; {_HOW}"
        raise InputError(message)
    first = calls[0].call
    for index, one in enumerate(calls):
        if one.call.spec != first.spec:
            message = (
                f"{where}: all calls must have the same shapes and constants, call 0 takes "
                f"{first.spec}, call {index} takes {one.call.spec}; record videos of one size"
            )
            raise InputError(message)
        for name, tensor in one.call.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                message = f"{where}: {name} of call {index} holds NaN or infinity; record again"
                raise InputError(message)
        for name, tensor in one.call.shared.items():
            if tensor is not first.shared[name] and not torch.equal(tensor, first.shared[name]):
                message = (
                    f"{where}: {name} has no batch axis and must be the same in all calls, it "
                    f"differs in call {index}; record videos of one kind"
                )
                raise InputError(message)
