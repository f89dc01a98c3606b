"""A batch, as a model takes it: a tensor of clips, or a call with several named tensors.

The rest of vcompress asks a batch for its length, for a slice of its samples and for a move to
another device. `torch.Tensor` can do that; so can `Call`.

Shapes: B samples. Arguments that are tuples or dictionaries of tensors are kept flat: the first of
a tuple `image_rotary_emb` is called `image_rotary_emb.0`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vcompress.spec.call import CallSpec, TensorSpec
from vcompress.spec.errors import InputError

__all__ = [
    "Batch", "Call", "as_batch", "as_computed", "call_of", "content_of", "equal_batches",
    "named_arrays", "run_module", "take_rows",
]  # fmt: skip

_PLAIN = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments of one call, of B samples.

    Attributes:
        tensors: `[B, ...]` by name; at least one.
        shared: tensors that belong to no sample, by name.
        constants: everything else, by name: plain values, and lists of them.
    """

    tensors: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice) -> Call:
        return self._with({name: tensor[rows] for name, tensor in self.tensors.items()})

    def _with(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        return Call(tensors=tensors, shared=self.shared, constants=self.constants)

    def to(self, device: torch.device | str) -> Call:
        """The same on `device`."""
        return Call(
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            shared={name: tensor.to(device) for name, tensor in self.shared.items()},
            constants=self.constants,
        )

    def repeated(self, batch_size: int) -> Call:
        """The samples over and over, `batch_size` of them."""
        rows = [index % len(self) for index in range(batch_size)]
        return take_rows(self, rows)

    @property
    def flat(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those of samples first: the inputs of an exported graph."""
        return {**self.tensors, **self.shared}

    def with_flat(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        """The call with other tensors, named as in `flat`."""
        return Call(
            tensors={name: tensors[name] for name in self.tensors},
            shared={name: tensors[name] for name in self.shared},
            constants=self.constants,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the module."""
        nested = _nested(self.flat)
        assert isinstance(nested, dict)
        return {**copy.deepcopy(dict(self.constants)), **nested}

    @property
    def spec(self) -> CallSpec:
        """What the call has in common with calls of other samples."""
        tensors = [
            TensorSpec(name=name, shape=tuple(tensor.shape[1:]), dtype=_word(tensor))
            for name, tensor in self.tensors.items()
        ]
        shared = [
            TensorSpec(name=name, shape=tuple(tensor.shape), dtype=_word(tensor), shared=True)
            for name, tensor in self.shared.items()
        ]
        return CallSpec(tensors=(*tensors, *shared), constants=dict(self.constants))


Batch = torch.Tensor | Call


def _word(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _nested(flat: Mapping[str, torch.Tensor]) -> Any:
    """`flat` with dotted names put into tuples and dictionaries again."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = tensor
    nested = {head: rest[""] if "" in rest else _nested(rest) for head, rest in groups.items()}
    if nested and all(name.isdecimal() for name in nested):
        return tuple(nested[name] for name in sorted(nested, key=int))
    return nested


def run_module(module: nn.Module, batch: Batch) -> Any:
    """What `module` returns for `batch`."""
    return module(**batch.arguments) if isinstance(batch, Call) else module(batch)


def call_of(arguments: Mapping[str, Any]) -> Call:
    """The call with these keyword arguments.

    The first tensor that has an axis gives the number of samples. A tensor without any axis (a time
    step) or with one row is given to every sample; one whose first axis is of another length is
    taken for one that all samples share.

    Raises:
        InputError: no tensor, or an argument that is neither tensors nor plain data.
    """
    flat: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in arguments.items():
        found = _tensors_of(name, value)
        if found:
            flat |= found
        elif _is_plain(value):
            constants[name] = value
        else:
            message = (
                f"argument {name} must be tensors alone or plain values alone, got "
                f"{type(value).__name__}; such a call cannot be recorded"
            )
            raise InputError(message)
    sized = [tensor for tensor in flat.values() if tensor.ndim]
    if not sized:
        message = f"no argument is a tensor with a batch axis: {', '.join(arguments) or 'none'}"
        raise InputError(message)
    count = len(sized[0])
    tensors, shared = {}, {}
    for name, tensor in flat.items():
        if tensor.ndim == 0 or len(tensor) == 1:
            tensors[name] = tensor.expand(count, *tensor.shape[1:])
        elif len(tensor) == count:
            tensors[name] = tensor
        else:
            shared[name] = tensor
    return Call(tensors=tensors, shared=shared, constants=constants)


def _tensors_of(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The tensors in `value` by their dotted names; empty if it holds anything else."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        inner = _tensors_of(f"{name}.{key}", item)
        if not inner:
            return {}
        found |= inner
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, _PLAIN)


def as_computed(call: Call) -> Call:
    """`call` with its floating-point tensors in float32, in which models are compared."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return Call(
        tensors={name: cast(tensor) for name, tensor in call.tensors.items()},
        shared={name: cast(tensor) for name, tensor in call.shared.items()},
        constants=call.constants,
    )


def take_rows(call: Call, rows: Sequence[int]) -> Call:
    """The samples at `rows`, in that order, as copies."""
    index = torch.tensor(rows)
    return call._with({name: tensor[index] for name, tensor in call.tensors.items()})


def content_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor`, in order."""
    # A tensor of one element may have strides that forbid a view.
    flat = torch.cat([tensor.detach().cpu().flatten()])
    return flat.view(torch.uint8).numpy().data


def as_batch(batch: Batch | npt.NDArray[Any]) -> Batch:
    """An array of clips as a tensor; batches as they are."""
    return torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def named_arrays(
    batch: Batch | npt.NDArray[Any], names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of an exported graph with inputs `names`."""
    if isinstance(batch, Call):
        return {name: tensor.contiguous().numpy() for name, tensor in batch.flat.items()}
    return {names[0]: batch.numpy() if isinstance(batch, torch.Tensor) else batch}


def equal_batches(first: Batch, second: Batch) -> bool:
    """Whether all samples are equal; what calls share is equal anyway."""
    if isinstance(first, Call) and isinstance(second, Call):
        return all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    return torch.equal(first, second)
