"""What each ONNX operator computes, in torch: one function an operator, found by `OPERATORS`.

Inputs come by position, attributes by their names in ONNX; what was an attribute in an older opset
and is an input since may come either way. Layers (MatMul with a weight, Gemm, Conv) are made by
`layers`, everything else is here.

Source: the operator specification, https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from vcompress.models.graphs.pooling import average_pool, global_average_pool, max_pool
from vcompress.models.graphs.values import Value, elementwise, integers, is_host, quotient, tensor

__all__ = ["OPERATORS", "TYPES", "compute", "padded"]

# By the numbers of TensorProto.DataType. All floating point is computed in float32, and unsigned
# integers for which torch lacks arithmetic in the next wider type.
TYPES: Mapping[int, torch.dtype] = MappingProxyType({
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.int32, 5: torch.int16,
    6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32, 11: torch.float32,
    12: torch.int64, 13: torch.int64, 16: torch.float32,
})  # fmt: skip
_END = 2**31 - 1


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    return functools.partial(elementwise, function, None)


def _same(
    on_tensors: Callable[..., torch.Tensor], on_numbers: Callable[..., Any] | None = None
) -> Callable[..., Value]:
    return functools.partial(elementwise, on_tensors, on_numbers)


def _divide(left: torch.Tensor, right: Any) -> torch.Tensor:
    whole = not any(torch.is_floating_point(tensor(one)) for one in (left, right))
    return torch.div(left, right, rounding_mode="trunc" if whole else None)


def _where(condition: torch.Tensor, left: Any, right: Any) -> torch.Tensor:
    return torch.where(condition.bool(), left, right)


def _many(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def folded(*values: Value) -> Value:
        return functools.reduce(function, values)

    return folded


_add = _same(torch.add, operator.add)
_minimum = _same(lambda a, b: torch.minimum(tensor(a, b), tensor(b, a)), min)
_maximum = _same(lambda a, b: torch.maximum(tensor(a, b), tensor(b, a)), max)


def _mean(*values: Value) -> Value:
    return _many(_add)(*values) / len(values)


def _mod(left: Value, right: Value, *, fmod: int = 0) -> Value:
    return elementwise(torch.fmod if fmod else torch.remainder, operator.mod, left, right)


def _clip(x: Value, low: Value = None, high: Value = None, *,
          min: Value = None, max: Value = None) -> Value:  # fmt: skip
    low, high = (min if low is None else low), (max if high is None else high)
    return torch.clamp(tensor(x), low, high)


def _cast(x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    dtype = TYPES[to]
    if is_host(x) and not dtype.is_floating_point and dtype is not torch.bool:
        return elementwise(lambda t: t.to(dtype), _whole, x)
    return tensor(x).to(dtype)


def _whole(number: Any) -> Any:
    # A size of a traced tensor is a whole number already, and must stay the symbol that it is.
    return int(number) if isinstance(number, float | bool) else number


def _cast_like(x: Value, like: Value) -> Value:
    return tensor(x).to(like.dtype) if isinstance(like, torch.Tensor) else x


def _identity(x: Value, *_ratio: Value, **_attributes: Any) -> Value:
    return x


def _shape(x: Value, *, start: int = 0, end: int | None = None) -> Value:
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


def _slice(x: Value, starts: Value = None, ends: Value = None, axes: Value = None,
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


def _range(start: Value, limit: Value, delta: Value) -> Value:
    return torch.arange(start, limit, delta)


def _axes(axes: Value, attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    axes = attributes.get("axes") if axes is None else axes
    return None if axes is None else integers(axes)


def _reduction(
    function: Callable[..., torch.Tensor], on_numbers: Callable[[Sequence[Any]], Any] | None = None
) -> Callable[..., Value]:
    def reduce(x: Value, axes: Value = None, *, keepdims: int = 1,
               noop_with_empty_axes: int = 0, **attributes: Any) -> Value:  # fmt: skip
        if is_host(x):
            if on_numbers is not None:
                result = on_numbers(integers(x))
                return (result,) if keepdims else result
            x = tensor(x)
        places = _axes(axes, attributes)
        if not places:
            if noop_with_empty_axes:
                return x
            places = tuple(range(x.ndim))
        return function(x, places, bool(keepdims))

    return reduce


def _product(x: torch.Tensor, axes: tuple[int, ...], keepdims: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdims)
    return x


def _arg(function: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    def pick(x: torch.Tensor, *, axis: int = 0, keepdims: int = 1,
             select_last_index: int = 0) -> torch.Tensor:  # fmt: skip
        return function(x, axis, bool(keepdims))

    return pick


def _top_k(x: torch.Tensor, k: Value, *, axis: int = -1, largest: int = 1,
           sorted: int = 1) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    values, indices = x.topk(integers(k)[0], axis, bool(largest), bool(sorted))
    return values, indices


def _softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return x.softmax(axis)


def _log_softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return x.log_softmax(axis)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return functional.gelu(x, approximate=approximate)


def _layer_norm(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int = -1,
    epsilon: float = 1e-5, stash_type: int = 1,
) -> torch.Tensor:  # fmt: skip
    sizes = list(x.shape[axis % x.ndim :])
    weight = tensor(scale, x).expand(sizes)
    return functional.layer_norm(
        x, sizes, weight, None if bias is None else tensor(bias, x).expand(sizes), epsilon
    )


def _rms_norm(x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5,
              stash_type: int = 1) -> torch.Tensor:  # fmt: skip
    return functional.rms_norm(x, list(x.shape[axis % x.ndim :]), scale, epsilon)


def _batch_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
                variance: torch.Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9,
                training_mode: int = 0, spatial: int = 1) -> torch.Tensor:  # fmt: skip
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def _instance_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *,
                   epsilon: float = 1e-5) -> torch.Tensor:  # fmt: skip
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_norm(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, num_groups: int,
                epsilon: float = 1e-5, stash_type: int = 1) -> torch.Tensor:  # fmt: skip
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


def _leaky_relu(x: torch.Tensor, *, alpha: float = 0.01) -> torch.Tensor:
    return functional.leaky_relu(x, alpha)


def _elu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return functional.elu(x, alpha)


def _p_relu(x: torch.Tensor, slope: Value) -> torch.Tensor:
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(x: torch.Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(alpha * x)


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


def _einsum(*values: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *values)


def _cum_sum(x: torch.Tensor, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Value:
    place = integers(axis)[0]
    source = x.flip(place) if reverse else x
    result = source.cumsum(place) - (source if exclusive else 0)
    return result.flip(place) if reverse else result


_UNARY: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log,
    "Erf": torch.erf, "Sin": torch.sin, "Cos": torch.cos, "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid, "Relu": torch.relu, "Floor": torch.floor, "Ceil": torch.ceil,
    "Round": torch.round, "Reciprocal": torch.reciprocal, "Not": torch.logical_not,
    "Softplus": functional.softplus, "HardSwish": functional.hardswish, "Mish": functional.mish,
    "Sign": torch.sign, "IsNaN": torch.isnan,
}  # fmt: skip

OPERATORS: Mapping[str, Callable[..., Any]] = MappingProxyType({
    **{name: _unary(function) for name, function in _UNARY.items()},
    "Add": _add, "Sub": _same(torch.sub, operator.sub), "Mul": _same(torch.mul, operator.mul),
    "Div": _same(_divide, quotient), "Pow": _same(torch.pow, operator.pow), "Mod": _mod,
    "Equal": _same(torch.eq, operator.eq), "Greater": _same(torch.gt, operator.gt),
    "GreaterOrEqual": _same(torch.ge, operator.ge), "Less": _same(torch.lt, operator.lt),
    "LessOrEqual": _same(torch.le, operator.le),
    "And": _same(lambda a, b: a.bool() & b, lambda a, b: a and b),
    "Or": _same(lambda a, b: a.bool() | b, lambda a, b: a or b), "Xor": _same(operator.xor),
    "Where": _same(_where, lambda condition, a, b: a if condition else b),
    "Min": _many(_minimum), "Max": _many(_maximum), "Sum": _many(_add), "Mean": _mean,
    "Clip": _clip, "Cast": _cast, "CastLike": _cast_like, "Identity": _identity,
    "Dropout": _identity, "Shape": _shape, "Reshape": _reshape, "Flatten": _flatten,
    "Transpose": _transpose, "Concat": _concat, "Gather": _gather,
    "GatherElements": _gather_elements, "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements, "BitShift": _bit_shift,
    "BitwiseAnd": _same(operator.and_, operator.and_),
    "BitwiseOr": _same(operator.or_, operator.or_),
    "BitwiseXor": _same(operator.xor, operator.xor),
    "Slice": _slice, "Split": _split, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "MatMul": torch.matmul,
    "Einsum": _einsum, "CumSum": _cum_sum, "Pad": _pad,
    "ReduceMean": _reduction(torch.mean), "ReduceSum": _reduction(torch.sum, sum),
    "ReduceMax": _reduction(torch.amax, max), "ReduceMin": _reduction(torch.amin, min),
    "ReduceProd": _reduction(_product, math.prod),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin), "TopK": _top_k,
    "Softmax": _softmax, "LogSoftmax": _log_softmax, "Gelu": _gelu,
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm,
    "BatchNormalization": _batch_norm, "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm, "LeakyRelu": _leaky_relu, "Elu": _elu, "PRelu": _p_relu,
    "HardSigmoid": _hard_sigmoid, "Swish": _swish, "MaxPool": max_pool,
    "AveragePool": average_pool, "GlobalAveragePool": global_average_pool,
})  # fmt: skip


def compute(op_type: str, *inputs: Value, **attributes: Any) -> Any:
    """What a node with the operator `op_type` computes; several outputs are a tuple."""
    return OPERATORS[op_type](*inputs, **attributes)
