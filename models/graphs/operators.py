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
from vcompress.models.graphs.rearrange import REARRANGING
from vcompress.models.graphs.values import Value, elementwise, integers, is_host, quotient, tensor

__all__ = ["OPERATORS", "TYPES", "compute"]

# By the numbers of TensorProto.DataType. All floating point is computed in float32, and unsigned
# integers for which torch lacks arithmetic in the next wider type.
TYPES: Mapping[int, torch.dtype] = MappingProxyType({
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.int32, 5: torch.int16,
    6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32, 11: torch.float32,
    12: torch.int64, 13: torch.int64, 16: torch.float32,
})  # fmt: skip


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
    **REARRANGING,
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
    "Clip": _clip, "Cast": _cast, "CastLike": _cast_like,
    "BitwiseAnd": _same(operator.and_, operator.and_),
    "BitwiseOr": _same(operator.or_, operator.or_),
    "BitwiseXor": _same(operator.xor, operator.xor),
    "MatMul": torch.matmul, "Einsum": _einsum, "CumSum": _cum_sum,
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
