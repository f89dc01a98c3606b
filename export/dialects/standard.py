"""Translations into standard ONNX that every dialect shares: INT8, FP8, convolution, attention.

Quantized weights stay stored as they are, followed by a DequantizeLinear; inputs pass through
QuantizeLinear and DequantizeLinear with zero points of zero, the pair that runtimes fuse into
their kernels. Everything is float32 in between, whatever the model's type is. QuantizeLinear has no
scale a token that is computed on the way, so such an input is divided by it, passes the pair with a
scale of 1, and is multiplied again.

Source: ONNX operators, opset 20 (https://onnx.ai/onnx/operators/). Not 21: ONNX
Runtime 1.32 refuses some INT8 graphs of opset 21 while it optimizes them, because of the attribute
`output_dtype` that QuantizeLinear has since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset20

from vcompress.compress.numerics import fp8, int8
from vcompress.compress.numerics.operands import LARGEST_VALUE, SMALLEST_SCALE
from vcompress.compress.tokens import decisions  # noqa: F401 - registers its operator
from vcompress.export.dialects.dialect import Translation

__all__ = [
    "TRANSLATIONS", "as_float", "constant", "dynamic_scale", "like", "op", "saturated",
]  # fmt: skip

# Its annotations are for eager tensors; here it records nodes for symbolic values.
op: Any = opset20


def constant(value: Any, dtype: Any = np.float32) -> Any:
    """A value that stands in the graph."""
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))


def as_float(x: Any) -> Any:
    """`x` as float32."""
    return x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)


def like(x: Any, example: Any) -> Any:
    """`x`, a float32 value, in the type of `example`."""
    return x if example.dtype == ir.DataType.FLOAT else op.Cast(x, to=example.dtype)


def _quantize_dequantize(x: Any, scale: Any, axis: int, code_type: Any) -> Any:
    zero_point = constant(np.zeros([int(size) for size in scale.shape]), code_type)
    codes = op.QuantizeLinear(as_float(x), scale, zero_point, axis=axis)
    return like(op.DequantizeLinear(codes, scale, zero_point, axis=axis), x)


def _int8_quantize_dequantize(x: Any, scale: Any, axis: int) -> Any:
    return _quantize_dequantize(x, scale, axis, np.int8)


def _int8_dequantize(codes: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, axis=axis)


def dynamic_scale(values: Any, largest_code: float) -> Any:
    """`numerics.operands.weight_scale` of the largest magnitudes along the last axis, kept as 1."""
    amax = op.ReduceMax(op.Abs(values), constant([-1], np.int64), keepdims=1)
    scale = op.Clip(op.Div(amax, constant(largest_code)), constant(SMALLEST_SCALE))
    return op.Where(op.Equal(amax, constant(0)), constant(1), scale)


def saturated(x: Any) -> Any:
    """`x` as float32, at most as large as a dynamic scale can be made for."""
    return op.Clip(as_float(x), constant(-LARGEST_VALUE), constant(LARGEST_VALUE))


def _quantize_dequantize_per_token(x: Any, largest_code: float, code_type: Any) -> Any:
    values = saturated(x)
    scale = dynamic_scale(values, largest_code)
    one, zero_point = constant(1), constant(0, code_type)
    codes = op.QuantizeLinear(op.Div(values, scale), one, zero_point)
    return like(op.Mul(op.DequantizeLinear(codes, one, zero_point), scale), x)


def _int8_quantize_dequantize_per_token(x: Any) -> Any:
    return _quantize_dequantize_per_token(x, int8.LARGEST_CODE, np.int8)


def _fp8_quantize_dequantize_per_token(x: Any) -> Any:
    return _quantize_dequantize_per_token(x, fp8.LARGEST_CODE, ml_dtypes.float8_e4m3fn)


def _fp8_quantize_dequantize(x: Any, scale: Any) -> Any:
    return _quantize_dequantize(x, scale, 0, ml_dtypes.float8_e4m3fn)


def _fp8_dequantize(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def _convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """Convolution over one to three axes.

    The exporter's own translation, of onnxscript 0.7, gives a Conv3d without bias one of a wrong
    shape.
    """
    num_axes = len(weight.shape) - 2
    if len(x.shape) != num_axes + 2:
        message = "a convolution without batch axis has no translation to ONNX here"
        raise NotImplementedError(message)
    strides, pads, dilations = (
        list(values) * (num_axes if len(values) == 1 else 1)
        for values in (stride, padding, dilation)
    )
    operands = (x, weight) if bias is None else (x, weight, bias)
    return op.Conv(*operands, strides=strides, pads=pads * 2, dilations=dilations, group=groups)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scaled dot-product attention as MatMul, Softmax, MatMul.

    The Attention operator of opset 23 is avoided: TensorRT-RTX refuses it for float32.
    Shapes: query `[..., L, D]`, key and value `[..., S, D]`.
    """
    if dropout_p or enable_gqa:
        message = "attention with dropout or grouped queries has no translation to ONNX here"
        raise NotImplementedError(message)
    axes = list(range(len(key.shape)))
    keys = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.Mul(op.MatMul(query, keys), like(constant(factor), query))
    if is_causal:
        size = (int(query.shape[-2]), int(key.shape[-2]))
        scores = _masked(scores, constant(np.tri(*size), np.bool_), query)
    elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = _masked(scores, attn_mask, query)
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _masked(scores: Any, mask: Any, example: Any) -> Any:
    """`scores` where `mask` is true, minus infinity elsewhere; they have the type of `example`."""
    return op.Where(mask, scores, like(constant(-math.inf), example))


def _decided(places: Any, scores: Any) -> Any:
    del scores
    return op.Identity(places)


TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    torch.ops.vcompress.int8_quantize_dequantize.default: _int8_quantize_dequantize,
    torch.ops.vcompress.int8_quantize_dequantize_per_token.default: (
        _int8_quantize_dequantize_per_token
    ),
    torch.ops.vcompress.int8_dequantize.default: _int8_dequantize,
    torch.ops.vcompress.fp8_quantize_dequantize.default: _fp8_quantize_dequantize,
    torch.ops.vcompress.fp8_quantize_dequantize_per_token.default: (
        _fp8_quantize_dequantize_per_token
    ),
    torch.ops.vcompress.fp8_dequantize.default: _fp8_dequantize,
    torch.ops.vcompress.decided.default: _decided,
    torch.ops.aten.conv1d.default: _convolution,
    torch.ops.aten.conv2d.default: _convolution,
    torch.ops.aten.conv3d.default: _convolution,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
