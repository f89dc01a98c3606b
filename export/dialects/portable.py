"""The portable dialect: ONNX Runtime on any CPU, in standard operators alone.

It accepts INT8 and FP8 weights behind DequantizeLinear, and no four-bit floating-point type. So
weights of NVFP4, of the MX formats and of INT4 stay in the file as bytes and scales, and a few
standard operators unpack them; ONNX Runtime does that once, when it loads the file. (It does take
INT4 behind DequantizeLinear, from opset 21 on, but would unpack it in every run; where it has a
kernel for that pattern, its default rounds the input to INT8, which nobody asked for.)
The dynamic block scales of NVFP4 and MX inputs are written out as arithmetic that gives the numbers
of `numerics`, value for value: it proves what FP4 hardware will answer, not how fast. NaN alone may
differ: it stays NaN, but whether its block becomes NaN with it is up to the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vcompress.compress.numerics import microscaling, mxfp8, nvfp4
from vcompress.compress.numerics.e2m1 import ELEMENT_VALUES, LARGEST_ELEMENT
from vcompress.export.dialects.dialect import Dialect
from vcompress.export.dialects.standard import (
    TRANSLATIONS,
    as_float,
    constant,
    dynamic_scale,
    like,
    op,
    saturated,
)

__all__ = ["PORTABLE"]

_INT4_VALUES = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
# The powers of two that the bytes of E8M0 stand for; the last is NaN.
_POWERS = (*(2.0**exponent for exponent in range(-127, 128)), float("nan"))


def _unpacked(packed: Any, values: Sequence[float]) -> Any:
    """The two elements of each byte, whose four bits count in `values`."""
    # Row b has the two elements of byte b, low four bits first.
    pairs = [[values[byte & 15], values[byte >> 4]] for byte in range(256)]
    return op.Gather(constant(pairs), op.Cast(packed, to=ir.DataType.INT32))


def _scaled(elements: Any, scale: Any, shape: Sequence[Any], block_size: int) -> Any:
    """A weight `[N, K]` from its `elements` and the `scale` of `shape` `[N, K / B]`."""
    num_rows, num_blocks = (int(size) for size in shape)
    blocks = op.Reshape(elements, constant([num_rows, num_blocks, block_size], np.int64))
    values = op.Mul(blocks, op.Unsqueeze(scale, constant([-1], np.int64)))
    return op.Reshape(values, constant([num_rows, num_blocks * block_size], np.int64))


def _power_of_each(exponents: Any) -> Any:
    return op.Gather(constant(_POWERS), op.Cast(exponents, to=ir.DataType.INT32))


def _nvfp4_dequantize(packed: Any, block_scale: Any, tensor_scale: Any) -> Any:
    scale = op.Mul(op.Cast(block_scale, to=ir.DataType.FLOAT), tensor_scale)
    elements = _unpacked(packed, ELEMENT_VALUES)
    return _scaled(elements, scale, block_scale.shape, nvfp4.BLOCK_SIZE)


def _mxfp4_dequantize(packed: Any, block_scale: Any) -> Any:
    elements, scale = _unpacked(packed, ELEMENT_VALUES), _power_of_each(block_scale)
    return _scaled(elements, scale, block_scale.shape, microscaling.BLOCK_SIZE)


def _mxfp8_dequantize(codes: Any, block_scale: Any) -> Any:
    elements, scale = op.Cast(codes, to=ir.DataType.FLOAT), _power_of_each(block_scale)
    return _scaled(elements, scale, block_scale.shape, microscaling.BLOCK_SIZE)


def _int4_dequantize(packed: Any, scale: Any) -> Any:
    elements = _unpacked(packed, _INT4_VALUES)
    group_size = 2 * int(packed.shape[-1]) // int(scale.shape[-1])
    return _scaled(elements, op.Cast(scale, to=ir.DataType.FLOAT), scale.shape, group_size)


def _by_blocks(
    x: Any, block_size: int, rounded: Callable[[Any], Any], *, saturate: bool = False
) -> Any:
    """`x` with `rounded` applied to its blocks of `block_size` values along the last axis."""
    # A zero in the target shape of Reshape copies that axis, so that it may be dynamic.
    axes, size = [0] * (len(x.shape) - 1), int(x.shape[-1])
    values = saturated(x) if saturate else as_float(x)
    blocks = op.Reshape(values, constant([*axes, size // block_size, block_size], np.int64))
    return like(op.Reshape(rounded(blocks), constant([*axes, size], np.int64)), x)


def _rounded_to_e2m1(scaled: Any) -> Any:
    """Elements of E2M1, saturating at 6."""
    scaled = op.Clip(scaled, constant(-LARGEST_ELEMENT), constant(LARGEST_ELEMENT))
    magnitude = op.Abs(scaled)
    # The step between elements is 0.5 below 2, 1 below 4 and 2 above; Round is half to even.
    step = op.Where(op.Less(magnitude, constant(4)), constant(1), constant(2))
    step = op.Where(op.Less(magnitude, constant(2)), constant(0.5), step)
    return op.Mul(op.Round(op.Div(scaled, step)), step)


def _rounded_to_e4m3(scaled: Any) -> Any:
    limit = mxfp8.LARGEST_ELEMENT
    scaled = op.Clip(scaled, constant(-limit), constant(limit))
    return op.Cast(op.Cast(scaled, to=ir.DataType.FLOAT8E4M3FN), to=ir.DataType.FLOAT)


def _nvfp4_quantize_dequantize(x: Any, tensor_scale: Any) -> Any:
    def rounded(blocks: Any) -> Any:
        amax = op.ReduceMax(op.Abs(blocks), constant([-1], np.int64), keepdims=1)
        scale = op.Div(amax, op.Mul(constant(LARGEST_ELEMENT), tensor_scale))
        scale = op.Clip(scale, constant(2.0**-9), constant(448))
        scale = op.Cast(op.Cast(scale, to=ir.DataType.FLOAT8E4M3FN), to=ir.DataType.FLOAT)
        scale = op.Mul(scale, tensor_scale)
        return op.Mul(_rounded_to_e2m1(op.Div(blocks, scale)), scale)

    return _by_blocks(x, nvfp4.BLOCK_SIZE, rounded)


def _next_power_of_two(scale: Any) -> Any:
    """The smallest powers of two that are not below `scale`, from 2^-100 to 2^126.

    With c = 2^24 s, the sum c + s has steps of 2^(e + 1) where s is from 2^e to 2^(e + 1), and s is
    more than half a step: the sum is c and one step. A power of two is exactly half a step, a tie,
    and c is the even one of the two, by which nothing is left.
    """
    # Neither c nor the result leave the range of normal numbers.
    small = op.Mul(scale, constant(2.0**-20))
    large = op.Mul(small, constant(2.0**24))
    step = op.Sub(op.Add(large, small), large)
    return op.Mul(op.Where(op.Equal(step, constant(0)), small, step), constant(2.0**20))


def _microscaled(x: Any, largest_element: float, round_elements: Callable[[Any], Any]) -> Any:
    def rounded(blocks: Any) -> Any:
        scale = _next_power_of_two(dynamic_scale(blocks, largest_element))
        return op.Mul(round_elements(op.Div(blocks, scale)), scale)

    return _by_blocks(x, microscaling.BLOCK_SIZE, rounded, saturate=True)


def _mxfp4_quantize_dequantize(x: Any) -> Any:
    return _microscaled(x, LARGEST_ELEMENT, _rounded_to_e2m1)


def _mxfp8_quantize_dequantize(x: Any) -> Any:
    return _microscaled(x, mxfp8.LARGEST_ELEMENT, _rounded_to_e4m3)


def _int8_quantize_dequantize(x: Any, scale: Any, axis: int) -> Any:
    zero_point = constant(np.full([int(size) for size in scale.shape], 128), np.uint8)
    codes = op.QuantizeLinear(as_float(x), scale, zero_point, axis=axis)
    return like(op.DequantizeLinear(codes, scale, zero_point, axis=axis), x)


def _feeds_an_integer_product(transpose: ir.Node) -> bool:
    """Whether the other operand of every product with the transposed weight has a static scale.

    With any other, ONNX Runtime would take a weight that lies ready for weight-only INT8, and round
    the input by rules of its own.
    """
    for use in transpose.outputs[0].uses():
        other = use.node.inputs[1 - use.idx] if use.node.op_type in ("MatMul", "Gemm") else None
        source = None if other is None else other.producer()
        if source is None or source.op_type not in ("DequantizeLinear", "Cast"):
            return False
    return True


def _store_weights_transposed(model: ir.Model) -> None:
    """Turn DequantizeLinear -> Transpose of a stored INT8 matrix into DequantizeLinear alone."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        stored, users = node.inputs[0], list(node.outputs[0].uses())
        if (
            stored is None
            or stored.const_value is None
            or stored.dtype != ir.DataType.INT8
            or len(stored.const_value.shape) != 2
            or len(stored.uses()) != 1
            or len(users) != 1
            or users[0].node.op_type != "Transpose"
            or not _feeds_an_integer_product(users[0].node)
        ):
            continue
        codes = np.ascontiguousarray(stored.const_value.numpy().T)
        stored.const_value = ir.tensor(codes, name=stored.name)
        stored.shape = ir.Shape(codes.shape)
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
        node.outputs[0].shape = ir.Shape(codes.shape)
        transpose = users[0].node
        ir.convenience.replace_all_uses_with(transpose.outputs[0], node.outputs[0])
        model.graph.remove(transpose, safe=True)


PORTABLE = Dialect(
    name="portable",
    opset=20,
    newer_opsets={},
    refused={},
    translations={
        **TRANSLATIONS,
        torch.ops.vcompress.int8_quantize_dequantize.default: _int8_quantize_dequantize,
        torch.ops.vcompress.int4_dequantize.default: _int4_dequantize,
        torch.ops.vcompress.mxfp4_dequantize.default: _mxfp4_dequantize,
        torch.ops.vcompress.mxfp4_quantize_dequantize.default: _mxfp4_quantize_dequantize,
        torch.ops.vcompress.mxfp8_dequantize.default: _mxfp8_dequantize,
        torch.ops.vcompress.mxfp8_quantize_dequantize.default: _mxfp8_quantize_dequantize,
        torch.ops.vcompress.nvfp4_dequantize.default: _nvfp4_dequantize,
        torch.ops.vcompress.nvfp4_quantize_dequantize.default: _nvfp4_quantize_dequantize,
    },
    finish=_store_weights_transposed,
)
