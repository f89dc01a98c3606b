"""The TensorRT dialect: TensorRT 11 and TensorRT-RTX, whose precision lives in the graph alone.

They accept INT8 and FP8 as standard QuantizeLinear and DequantizeLinear with zero points of zero,
and NVFP4 as FLOAT4E2M1 weights behind two DequantizeLinear, which needs opset 23. ONNX has no
operator for the dynamic block scales of NVFP4 inputs; both have one of their own,
`trt::TRT_FP4DynamicQuantize`.
Source: onnx-tensorrt's operator list and what nvidia-modelopt writes.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23, values

from vcompress.compress.numerics.nvfp4 import BLOCK_SIZE
from vcompress.export.dialects.dialect import Dialect
from vcompress.export.dialects.standard import TRANSLATIONS, as_float, like, op

__all__ = ["DYNAMIC_QUANTIZE", "TENSORRT"]

block_op: Any = opset23
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
# FLOAT4E2M1 and its use in DequantizeLinear came with this version of the file format.
_IR_VERSION_WITH_NVFP4 = 11


def _dynamic_quantize_schema() -> onnx.defs.OpSchema:
    """Of `TRT_FP4DynamicQuantize`: x, tensor scale -> E2M1 elements, E4M3 block scales."""
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    integers = ("axis", "block_size", "scale_type")
    return schema(
        DYNAMIC_QUANTIZE,
        "trt",
        1,
        inputs=[parameter("x", "tensor(float)"), parameter("scale", "tensor(float)")],
        outputs=[
            parameter("y", "tensor(float4e2m1)"),
            parameter("y_scale", "tensor(float8e4m3fn)"),
        ],
        attributes=[schema.Attribute(name, schema.AttrType.INT) for name in integers],
    )


def _nvfp4_dequantize(packed: Any, block_scale: Any, tensor_scale: Any) -> Any:
    # `packed` is still uint8 here; `_retype_packed_weights` tells the file what it is.
    scale = op.DequantizeLinear(block_scale, tensor_scale)
    return block_op.DequantizeLinear(packed, scale, axis=-1, block_size=BLOCK_SIZE)


def _nvfp4_quantize_dequantize(x: Any, tensor_scale: Any) -> Any:
    quantize: Any = values.Op(values.Opset("trt", 1), DYNAMIC_QUANTIZE, _dynamic_quantize_schema())
    codes, block_scale = quantize(
        as_float(x),
        tensor_scale,
        axis=-1,
        block_size=BLOCK_SIZE,
        scale_type=ir.DataType.FLOAT8E4M3FN.value,
    )
    scale = op.DequantizeLinear(block_scale, tensor_scale)
    result = block_op.DequantizeLinear(codes, scale, axis=-1, block_size=BLOCK_SIZE)
    return like(result, x)


def _retype_packed_weights(model: ir.Model) -> None:
    """Declare bytes that a DequantizeLinear reads as what they hold, FLOAT4E2M1 `[N, K]`.

    torch has no such type, so the exporter saw uint8 `[N, K/2]`. The bytes are the same.
    """
    for weight in model.graph.initializers.values():
        readers = {node.op_type for node in weight.consumers()}
        if weight.dtype != ir.DataType.UINT8 or readers != {"DequantizeLinear"}:
            continue
        assert weight.const_value is not None
        packed = weight.const_value.numpy()
        shape = ir.Shape([packed.shape[0], 2 * packed.shape[1]])
        weight.const_value = ir.PackedTensor(
            packed, ir.DataType.FLOAT4E2M1, shape=shape, name=weight.name
        )
        weight.dtype = ir.DataType.FLOAT4E2M1
        weight.shape = shape
        model.ir_version = max(model.ir_version or 0, _IR_VERSION_WITH_NVFP4)


TENSORRT = Dialect(
    name="tensorrt",
    opset=20,
    opset_with_nvfp4=23,
    translations={
        **TRANSLATIONS,
        torch.ops.vcompress.nvfp4_dequantize.default: _nvfp4_dequantize,
        torch.ops.vcompress.nvfp4_quantize_dequantize.default: _nvfp4_quantize_dequantize,
    },
    finish=_retype_packed_weights,
)
