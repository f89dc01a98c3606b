"""Values of a graph: tensors, and the sizes that its shape arithmetic works on.

A size of a traced tensor is no number but a symbol. Kept as Python values (an integer, a tuple of
integers) sizes stay what they are through `Shape`, `Gather`, `Concat` and `Reshape`, and
`torch.export` can leave the batch free. Small integer constants are such values, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "MAX_HOST_ELEMENTS", "Value", "elementwise", "integers", "is_host",
    "quotient", "tensor",
]  # fmt: skip

Value = Any  # a tensor, a number, or a tuple of numbers
MAX_HOST_ELEMENTS = 64


def is_host(value: Value) -> bool:
    """Whether `value` is a number or a tuple of numbers."""
    return not isinstance(value, torch.Tensor)


def tensor(value: Value, like: torch.Tensor | None = None) -> torch.Tensor:
    """`value` as a tensor, on the device of `like`."""
    if isinstance(value, torch.Tensor):
        return value
    device = None if like is None else like.device
    flat = value if isinstance(value, tuple) else (value,)
    if any(isinstance(one, torch.SymInt) for one in flat):
        parts = [torch.full((), one, dtype=torch.int64, device=device) for one in flat]
        return torch.stack(parts) if isinstance(value, tuple) else parts[0]
    dtype = torch.int64 if isinstance(value, tuple) and not value else None
    return torch.tensor(value, device=device, dtype=dtype)


def integers(value: Value) -> tuple[Any, ...]:
    """`value` as a tuple of sizes."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def elementwise(
    on_tensors: Callable[..., torch.Tensor], on_numbers: Callable[..., Any] | None, *values: Value
) -> Value:
    """Broadcast a function over `values`; among sizes alone the result is a size, too."""
    if all(is_host(value) for value in values):
        if on_numbers is None:
            return on_tensors(*(tensor(value) for value in values))
        lengths = {len(value) for value in values if isinstance(value, tuple)}
        if not lengths:
            return on_numbers(*values)
        length = 0 if 0 in lengths else max(lengths)
        columns = [
            (value if len(value) == length else value * length)
            if isinstance(value, tuple)
            else (value,) * length
            for value in values
        ]
        return tuple(on_numbers(*row) for row in zip(*columns, strict=True))
    like = next(value for value in values if isinstance(value, torch.Tensor))
    # A plain number takes the type of the tensor that it meets; torch wants a tensor first.
    first, *others = values
    return on_tensors(
        tensor(first, like),
        *(tensor(value, like) if isinstance(value, tuple) else value for value in others),
    )


def quotient(left: Any, right: Any) -> Any:
    """Of integers, rounded towards zero, as ONNX has it."""
    if isinstance(left, float) or isinstance(right, float):
        return left / right if right else math.copysign(math.inf, left)
    return left // right
