"""ONNX operators that move, cut or repeat values and change none; sizes stay sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from vcompress.models.graphs.values import Value, integers, is_host, tensor

__all__ = ["REARRANGING", "padded"]

_END = 2**31 - 1


def _identity(x: Value, *_ratio: Value, **_attributes: Any) -> Value:
    return x


def _shape_of(x: Value, *, start: int = 0, end: int | None = None) -> Value:
    sizes = (len(x),) if isinstance(x, tuple) else () if is_host(x) else tuple(x.shape)
    return sizes[start:end]


def _reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    sizes = integers(shape)
    if is_host(x):
        if len(sizes) == 1:
            return integers(x)
        if not sizes:
            return integers(x)[0]
        x = tensor(x)
    if not allowzero:
        sizes = tuple(
            x.shape[axis] if isinstance(size, int) and size == 0 else size
            for axis, size in enumerate(sizes)
        )
    return x.reshape(sizes)


def _flatten(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    axis %= x.ndim + 1
    if axis == 1:
        return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(x: torch.Tensor, *, perm: Sequence[int] | None = None) -> torch.Tensor:
    return x.permute(tuple(perm) if perm is not None else tuple(range(x.ndim))[::-1])


def _concat(*values: Value, axis: int) -> Value:
    if all(is_host(value) for value in values):
        return tuple(one for value in values for one in integers(value))
    like = next(value for value in values if isinstance(value, torch.Tensor))
    parts = [tensor(value, like) for value in values]
    if axis % like.ndim and not all(_is_one(part.shape[0]) for part in parts):
        # A constant of a graph for one sample, such as a class token, goes to every sample.
        batch = next(part.shape[0] for part in parts if not _is_one(part.shape[0]))
        parts = [
            part.expand(batch, *part.shape[1:]) if _is_one(part.shape[0]) else part
            for part in parts
        ]
    return torch.cat(parts, axis)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    if is_host(x) and is_host(indices):
        sizes = integers(x)
        if isinstance(indices, tuple):
            return tuple(sizes[index] for index in indices)
        return sizes[indices]
    x = tensor(x)
    if is_host(indices) and not isinstance(indices, tuple):
        return x.select(axis, indices)
    indices = tensor(indices, x).long()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    axis %= x.ndim
    picked = x.index_select(axis, indices.flatten())
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_nd(x: torch.Tensor, indices: Value, *, batch_dims: int = 0) -> torch.Tensor:
    if batch_dims:
        message = "GatherND with batch_dims"
        raise NotImplementedError(message)
    return x[tensor(indices, x).long().unbind(-1)]


def _scatter_elements(x: torch.Tensor, indices: Value, updates: torch.Tensor, *, axis: int = 0,
                      reduction: str = "none") -> torch.Tensor:  # fmt: skip
    places = tensor(indices, x).long()
    places = torch.where(places < 0, places + x.shape[axis], places)
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, places, updates)
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return x.scatter_reduce(axis, places, updates, name)


def _bit_shift(x: Value, amount: Value, *, direction: str) -> Value:
    # Shifts are not defined for all unsigned types in torch, and not exported by a tensor.
    by = amount if is_host(amount) else amount.long()
    shifted = tensor(x).long() << by if direction == "LEFT" else tensor(x).long() >> by
    return shifted.to(tensor(x).dtype)


def _gather_elements(x: torch.Tensor, indices: Value, *, axis: int = 0) -> torch.Tensor:
    indices = tensor(indices, x).long()
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _sliced(x: Value, starts: Value = None, ends: Value = None, axes: Value = None,
           steps: Value = None, **attributes: Any) -> Value:  # fmt: skip
    starts = integers(attributes.get("starts") if starts is None else starts)
    ends = integers(attributes.get("ends") if ends is None else ends)
    axes = attributes.get("axes") if axes is None else axes
    places = tuple(range(len(starts))) if axes is None else integers(axes)
    strides = (1,) * len(starts) if steps is None else integers(steps)
    if is_host(x):
        return integers(x)[starts[0] : ends[0] : strides[0]]
    for start, end, axis, step in zip(starts, ends, places, strides, strict=True):
        if isinstance(step, int) and step < 0:
            size = x.shape[axis]
            order = range(size)[start if start < size else None : end if end >= -size else None :
                                step]  # fmt: skip
            x = x.index_select(axis, torch.tensor(list(order), device=x.device))
            continue
        if isinstance(end, int) and end >= _END:
            end = x.shape[axis]
        whole: list[Any] = [slice(None)] * x.ndim
        whole[axis] = slice(start, end, step)
        x = x[tuple(whole)]
    return x


def _split(x: Value, sizes: Value = None, *, axis: int = 0, num_outputs: int = 0,
           split: Sequence[int] | None = None, parts: int = 1) -> tuple[Value, ...]:  # fmt: skip
    """`parts` is the number of outputs that the node has."""
    sizes = split if sizes is None else sizes
    if is_host(x):
        steps = integers(sizes) if sizes is not None else (len(x) // parts,) * parts
        ends = [sum(steps[: place + 1]) for place in range(len(steps))]
        return tuple(x[end - step : end] for end, step in zip(ends, steps, strict=True))
    if sizes is not None:
        return tuple(x.split(list(integers(sizes)), axis))
    return tuple(x.split(-(-x.shape[axis] // parts), axis))


def _squeeze(x: Value, axes: Value = None, **attributes: Any) -> Value:
    axes = attributes.get("axes") if axes is None else axes
    if is_host(x):
        return x[0] if isinstance(x, tuple) else x
    return x.squeeze() if axes is None else x.squeeze(integers(axes))


def _unsqueeze(x: Value, axes: Value = None, **attributes: Any) -> Value:
    places = integers(attributes.get("axes") if axes is None else axes)
    if is_host(x) and not isinstance(x, tuple | float) and len(places) == 1:
        return (x,)
    x = tensor(x)
    rank = x.ndim + len(places)
    for axis in sorted(place % rank for place in places):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Value, shape: Value) -> Value:
    sizes = list(integers(shape))
    x = tensor(x)
    sizes = [1] * (x.ndim - len(sizes)) + sizes
    own = (1,) * (len(sizes) - x.ndim) + tuple(x.shape)
    # In ONNX a 1 in the shape keeps what is there.
    return x.expand([
        have if isinstance(want, int) and want == 1 else want
        for have, want in zip(own, sizes, strict=True)
    ])  # fmt: skip


def _tile(x: Value, repeats: Value) -> Value:
    return tensor(x).repeat(integers(repeats))


def _constant_of_shape(shape: Value, *, value: float = 0.0) -> Value:
    sizes = integers(shape)
    if len(sizes) == 1 and isinstance(value, int) and isinstance(sizes[0], int) and sizes[0] <= 8:
        return (value,) * sizes[0]
    return torch.full(sizes, value)


def _counted(start: Value, limit: Value, delta: Value) -> Value:
    return torch.arange(start, limit, delta)


def _reflected(size: int, low: int, high: int, mode: str) -> list[int]:
    """Which of `size` elements stands at each place of an axis padded with others of itself."""
    places = range(-low, size + high)
    if mode == "edge":
        return [min(max(place, 0), size - 1) for place in places]
    if mode == "wrap":
        return [place % size for place in places]
    period = max(2 * (size - 1), 1)
    return [min(place % period, -place % period) for place in places]


def padded(x: torch.Tensor, before: Sequence[Any], after: Sequence[Any], axes: Sequence[int],
           mode: str = "constant", value: float = 0.0) -> torch.Tensor:  # fmt: skip
    """`x` with so many elements before and behind it along `axes`."""
    if mode != "constant":
        for low, high, axis in zip(before, after, axes, strict=True):
            if low or high:
                places = _reflected(x.shape[axis], low, high, mode)
                x = x.index_select(axis, torch.tensor(places, device=x.device))
        return x
    amounts: list[Any] = [0] * (2 * x.ndim)
    for low, high, axis in zip(before, after, axes, strict=True):
        place = 2 * (x.ndim - 1 - axis % x.ndim)
        amounts[place : place + 2] = low, high
    return functional.pad(x, amounts, value=value)


def _pad(x: torch.Tensor, amounts: Value = None, value: Value = None, axes: Value = None, *,
         mode: str = "constant", pads: Sequence[int] | None = None) -> torch.Tensor:  # fmt: skip
    sizes = integers(pads if amounts is None else amounts)
    half = len(sizes) // 2
    places = tuple(range(half)) if axes is None else integers(axes)
    fill = 0.0 if value is None else value
    return padded(x, sizes[:half], sizes[half:], places, mode, fill)


# By operator.
REARRANGING: Mapping[str, Callable[..., Any]] = MappingProxyType({
    "Identity": _identity, "Dropout": _identity, "Shape": _shape_of, "Reshape": _reshape,
    "Flatten": _flatten, "Transpose": _transpose, "Concat": _concat, "Gather": _gather,
    "GatherElements": _gather_elements, "GatherND": _gather_nd, "ScatterElements":
    _scatter_elements, "BitShift": _bit_shift, "Slice": _sliced, "Split": _split, "Squeeze":
    _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile, "ConstantOfShape":
    _constant_of_shape, "Range": _counted, "Pad": _pad,
})  # fmt: skip
