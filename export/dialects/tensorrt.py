"""The TensorRT dialect: TensorRT 11 and TensorRT-RTX, whose precision lives in the graph alone.

They accept INT8 and FP8 as standard QuantizeLinear and DequantizeLinear with zero points of zero,
INT4 weights as INT4 behind a DequantizeLinear with blocks, which needs opset 21, and NVFP4 as
FLOAT4E2M1 weights behind two DequantizeLinear, which needs opset 23. ONNX has no operator for
dynamic block scales; both have their own, `trt::TRT_FP4DynamicQuantize` for NVFP4 and
`trt::TRT_MXFP8DynamicQuantize` for MXFP8, whose scales are bytes. MXFP4 has none: the parser takes
blocks of 16 only, and no stored E8M0.
Source: onnx-tensorrt's operator list and what nvidia-modelopt writes; what is refused was tried
with TensorRT-RTX 1.7.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21, opset23, values

from vcompress.compress.numerics import microscaling, nvfp4
from vcompress.export.dialects import integers
from vcompress.export.dialects.dialect import Dialect
from vcompress.export.dialects.standard import TRANSLATIONS, as_float, like, op

__all__ = ["DYNAMIC_QUANTIZE", "TENSORRT"]

group_op: Any = opset21
block_op: Any = opset23
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
_MXFP8_QUANTIZE = "TRT_MXFP8DynamicQuantize"
_MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
_MOVES = (
    "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
# INT4 and FLOAT4E2M1, and their use in DequantizeLinear, came with these versions of the format.
_IR_VERSIONS = {ir.DataType.INT4: 10, ir.DataType.FLOAT4E2M1: 11}


def _operator(
    name: str, inputs: dict[str, str], outputs: dict[str, str], attributes: tuple[str, ...]
) -> Any:
    """An operator of the domain `trt`: types by name of inputs and outputs, integer attributes."""
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    described = schema(
        name,
        "trt",
        1,
        inputs=[parameter(each, f"tensor({kind})") for each, kind in inputs.items()],
        outputs=[parameter(each, f"tensor({kind})") for each, kind in outputs.items()],
        attributes=[schema.Attribute(each, schema.AttrType.INT) for each in attributes],
    )
    return values.Op(values.Opset("trt", 1), name, described)


def _nvfp4_dequantize(packed: Any, block_scale: Any, tensor_scale: Any) -> Any:
    # `packed` is still uint8 here; `_retype_packed_weights` tells the file what it is.
    scale = op.DequantizeLinear(block_scale, tensor_scale)
    return block_op.DequantizeLinear(packed, scale, axis=-1, block_size=nvfp4.BLOCK_SIZE)


def _nvfp4_quantize_dequantize(x: Any, tensor_scale: Any) -> Any:
    quantize = _operator(
        DYNAMIC_QUANTIZE, {"x": "float", "scale": "float"},
        {"y": "float4e2m1", "y_scale": "float8e4m3fn"}, ("axis", "block_size", "scale_type"),
    )  # fmt: skip
    codes, block_scale = quantize(
        as_float(x),
        tensor_scale,
        axis=-1,
        block_size=nvfp4.BLOCK_SIZE,
        scale_type=ir.DataType.FLOAT8E4M3FN.value,
    )
    scale = op.DequantizeLinear(block_scale, tensor_scale)
    result = block_op.DequantizeLinear(codes, scale, axis=-1, block_size=nvfp4.BLOCK_SIZE)
    return like(result, x)


def _int4_dequantize(packed: Any, scale: Any) -> Any:
    group_size = 2 * int(packed.shape[-1]) // int(scale.shape[-1])
    return group_op.DequantizeLinear(packed, as_float(scale), axis=-1, block_size=group_size)


def _mxfp8_dequantize(codes: Any, block_scale: Any) -> Any:
    dequantize = _operator(
        _MXFP8_DEQUANTIZE, {"x": "float8e4m3fn", "scale": "uint8"}, {"y": "float"},
        ("axis", "block_size", "output_dtype"),
    )  # fmt: skip
    return dequantize(
        codes,
        block_scale,
        axis=-1,
        block_size=microscaling.BLOCK_SIZE,
        output_dtype=ir.DataType.FLOAT.value,
    )


def _mxfp8_quantize_dequantize(x: Any) -> Any:
    quantize = _operator(
        _MXFP8_QUANTIZE, {"x": "float"}, {"y": "float8e4m3fn", "y_scale": "uint8"},
        ("axis", "block_size", "output_dtype"),
    )  # fmt: skip
    codes, block_scale = quantize(
        as_float(x),
        axis=-1,
        block_size=microscaling.BLOCK_SIZE,
        output_dtype=ir.DataType.FLOAT8E4M3FN.value,
    )
    return like(_mxfp8_dequantize(codes, block_scale), x)


def _retype_packed_weights(model: ir.Model) -> None:
    """Declare bytes that a DequantizeLinear reads as what they hold, four-bit values `[N, K]`.

    torch has no such types, so the exporter saw uint8 `[N, K/2]`. The bytes are the same.
    """
    for weight in model.graph.initializers.values():
        readers = list(weight.consumers())
        if weight.dtype != ir.DataType.UINT8 or not all(
            node.op_type == "DequantizeLinear" for node in readers
        ):
            continue
        assert weight.const_value is not None
        packed = weight.const_value.numpy()
        blocks = {node.attributes["block_size"].as_int() for node in readers}
        kind = ir.DataType.FLOAT4E2M1 if blocks == {nvfp4.BLOCK_SIZE} else ir.DataType.INT4
        shape = ir.Shape([packed.shape[0], 2 * packed.shape[1]])
        weight.const_value = ir.PackedTensor(packed, kind, shape=shape, name=weight.name)
        weight.dtype = kind
        weight.shape = shape
        model.ir_version = max(model.ir_version or 0, _IR_VERSIONS[kind])


def _cast_bytes_first(model: ir.Model) -> None:
    """Make integers of inputs of bytes before they are moved: TensorRT does not move bytes.

    Where they are computed with, and not only moved and cast, the graph stays as it is.
    """
    for value in model.graph.inputs:
        readers = [usage.node for usage in value.uses()]
        moved = _only_moved(value) if value.dtype == ir.DataType.UINT8 else None
        if not moved:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.INT32}, name=f"{value.name}_cast")
        (first,) = cast.outputs
        first.name, first.shape, first.dtype = f"{value.name}_int32", value.shape, ir.DataType.INT32
        model.graph.insert_before(next(iter(model.graph)), cast)
        for node in readers:
            node.replace_input_with(node.inputs.index(value), first)
        for each in moved:
            each.dtype = ir.DataType.INT32


def _only_moved(value: ir.Value) -> list[ir.Value] | None:
    """What `value` is moved to before it is cast; None where something else is done with it."""
    moved: list[ir.Value] = []
    for node, index in value.uses():
        if node.op_type in ("Cast", "Shape"):
            continue
        if node.op_type not in _MOVES or index != 0 or len(node.outputs) != 1:
            return None
        behind = _only_moved(node.outputs[0])
        if behind is None:
            return None
        moved += [node.outputs[0], *behind]
    return moved


def _finish(model: ir.Model) -> None:
    _retype_packed_weights(model)
    _cast_bytes_first(model)


TENSORRT = Dialect(
    name="tensorrt",
    opset=20,
    newer_opsets={"nvfp4": 23, "int4": 21},
    refused={"mxfp4": "TensorRT has neither blocks of 32 for FP4 inputs nor stored E8M0 scales"},
    translations={
        **TRANSLATIONS,
        **integers.TRANSLATIONS,
        torch.ops.vcompress.int4_dequantize.default: _int4_dequantize,
        torch.ops.vcompress.mxfp8_dequantize.default: _mxfp8_dequantize,
        torch.ops.vcompress.mxfp8_quantize_dequantize.default: _mxfp8_quantize_dequantize,
        torch.ops.vcompress.nvfp4_dequantize.default: _nvfp4_dequantize,
        torch.ops.vcompress.nvfp4_quantize_dequantize.default: _nvfp4_quantize_dequantize,
    },
    finish=_finish,
)
