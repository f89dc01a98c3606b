"""The portable dialect: ONNX Runtime on any CPU, in standard operators alone.

It accepts INT8 and FP8 weights behind DequantizeLinear, and no four-bit floating-point
type. So NVFP4 weights stay in the file as packed bytes, block scales and tensor scale, and a few
standard operators unpack them; ONNX Runtime does that once, when it loads the file. The dynamic
block scales of NVFP4 inputs are written out as arithmetic that gives the numbers of
`numerics.nvfp4`, value for value: it proves what FP4 hardware will answer, not how fast. NaN
alone may differ: it stays NaN, but whether its block becomes NaN with it is up to the runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vcompress.compress.numerics.nvfp4 import BLOCK_SIZE, ELEMENT_VALUES
from vcompress.export.dialects.dialect import Dialect
from vcompress.export.dialects.standard import TRANSLATIONS, as_float, constant, like, op

__all__ = ["PORTABLE"]


def _nvfp4_dequantize(packed: Any, block_scale: Any, tensor_scale: Any) -> Any:
    num_rows, num_blocks = (int(size) for size in block_scale.shape)
    # Row b has the two elements of byte b, low four bits first.
    pairs = [[ELEMENT_VALUES[byte & 15], ELEMENT_VALUES[byte >> 4]] for byte in range(256)]
    elements = op.Gather(constant(pairs), op.Cast(packed, to=ir.DataType.INT32))
    blocks = op.Reshape(elements, constant([num_rows, num_blocks, BLOCK_SIZE], np.int64))
    scale = op.Mul(op.Cast(block_scale, to=ir.DataType.FLOAT), tensor_scale)
    values = op.Mul(blocks, op.Unsqueeze(scale, constant([-1], np.int64)))
    return op.Reshape(values, constant([num_rows, num_blocks * BLOCK_SIZE], np.int64))


def _nvfp4_quantize_dequantize(x: Any, tensor_scale: Any) -> Any:
    # A zero in the target shape of Reshape copies that axis, so that it may be dynamic.
    axes, size = [0] * (len(x.shape) - 1), int(x.shape[-1])
    blocks = op.Reshape(as_float(x), constant([*axes, size // BLOCK_SIZE, BLOCK_SIZE], np.int64))
    amax = op.ReduceMax(op.Abs(blocks), constant([-1], np.int64), keepdims=1)
    scale = op.Div(amax, op.Mul(constant(6), tensor_scale))
    scale = op.Clip(scale, constant(2.0**-9), constant(448))
    scale = op.Cast(op.Cast(scale, to=ir.DataType.FLOAT8E4M3FN), to=ir.DataType.FLOAT)
    scale = op.Mul(scale, tensor_scale)
    scaled = op.Clip(op.Div(blocks, scale), constant(-6), constant(6))
    magnitude = op.Abs(scaled)
    # The step between elements is 0.5 below 2, 1 below 4 and 2 above; Round is half to even.
    step = op.Where(op.Less(magnitude, constant(4)), constant(1), constant(2))
    step = op.Where(op.Less(magnitude, constant(2)), constant(0.5), step)
    elements = op.Mul(op.Round(op.Div(scaled, step)), step)
    result = op.Reshape(op.Mul(elements, scale), constant([*axes, size], np.int64))
    return like(result, x)


def _int8_quantize_dequantize(x: Any, scale: Any, axis: int) -> Any:
    zero_point = constant(np.full([int(size) for size in scale.shape], 128), np.uint8)
    codes = op.QuantizeLinear(as_float(x), scale, zero_point, axis=axis)
    return like(op.DequantizeLinear(codes, scale, zero_point, axis=axis), x)


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
    opset_with_nvfp4=20,
    translations={
        **TRANSLATIONS,
        torch.ops.vcompress.int8_quantize_dequantize.default: _int8_quantize_dequantize,
        torch.ops.vcompress.nvfp4_dequantize.default: _nvfp4_dequantize,
        torch.ops.vcompress.nvfp4_quantize_dequantize.default: _nvfp4_quantize_dequantize,
    },
    finish=_store_weights_transposed,
)
