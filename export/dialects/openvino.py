"""The OpenVINO dialect, written from the TensorRT one: operators of the domain `trt` are replaced.

OpenVINO takes QuantizeLinear and DequantizeLinear, and fuses INT8 pairs into integer kernels; it
stores FLOAT4E2M1 and INT4 weights as four bits, and decompresses them as it multiplies. Of dynamic
block scales it knows nothing: those of NVFP4 and MXFP8 inputs become the arithmetic of the portable
dialect. MXFP8 weights become bytes times a table of powers of two.
Values are rounded to E4M3 with float operators alone: OpenVINO 2026.4 has no Cast to it on a CPU,
where it ends with an error, or, if the batch is free, with an empty output and none.
Source: OpenVINO's ONNX frontend, and what its compiled graphs say about their kernels.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from vcompress.export.dialects.concats import keep_behind_concats
from vcompress.spec.errors import BuildError

__all__ = ["for_openvino"]

_DOMAIN = "vcompress"
_BLOCK_OF_NVFP4 = 16
_BLOCK_OF_MX = 32
_TABLE = "vcompress_powers_of_two"

# The arithmetic of `dialects.portable`, operator for operator: `readback` knows it by its form.
_ROUND_NVFP4 = """
<domain: "vcompress", opset_import: ["" : 20]>
RoundNvfp4 (x, tensor_scale, blocked) => (y) {
  sizes = Shape (x)
  last = Constant <value_ints = [-1]> ()
  zero = Constant <value_float = 0.0> ()
  six = Constant <value_float = 6.0> ()
  minus_six = Constant <value_float = -6.0> ()
  half = Constant <value_float = 0.5> ()
  one = Constant <value_float = 1.0> ()
  two = Constant <value_float = 2.0> ()
  four = Constant <value_float = 4.0> ()
  smallest = Constant <value_float = 0.001953125> ()
  largest = Constant <value_float = 448.0> ()
  down = Constant <value_float = 9.5367431640625e-07> ()
  up = Constant <value_float = 1048576.0> ()
  shift = Constant <value_float = 16777216.0> ()
  sixteenth = Constant <value_float = 0.0625> ()
  blocks = Reshape (x, blocked)
  sizes_of = Abs (blocks)
  amax = ReduceMax <keepdims = 1> (sizes_of, last)
  full = Mul (six, tensor_scale)
  ideal = Div (amax, full)
  clipped = Clip (ideal, smallest, largest)
  e4m3_small = Mul (clipped, down)
  e4m3_large = Mul (e4m3_small, shift)
  e4m3_sum = Add (e4m3_large, e4m3_small)
  e4m3_rest = Sub (e4m3_sum, e4m3_large)
  e4m3_exact = Equal (e4m3_rest, zero)
  e4m3_choice = Where (e4m3_exact, e4m3_small, e4m3_rest)
  e4m3_power = Mul (e4m3_choice, up)
  e4m3_free = Mul (e4m3_power, sixteenth)
  e4m3_step = Max (e4m3_free, smallest)
  e4m3_steps = Div (clipped, e4m3_step)
  e4m3_rounded = Round (e4m3_steps)
  decoded = Mul (e4m3_rounded, e4m3_step)
  scale = Mul (decoded, tensor_scale)
  scaled = Div (blocks, scale)
  limited = Clip (scaled, minus_six, six)
  magnitude = Abs (limited)
  below_four = Less (magnitude, four)
  coarse = Where (below_four, one, two)
  below_two = Less (magnitude, two)
  step = Where (below_two, half, coarse)
  steps = Div (limited, step)
  rounded = Round (steps)
  elements = Mul (rounded, step)
  result = Mul (elements, scale)
  y = Reshape (result, sizes)
}
"""
_ROUND_MXFP8 = """
<domain: "vcompress", opset_import: ["" : 20]>
RoundMxfp8 (x, blocked) => (y) {
  sizes = Shape (x)
  last = Constant <value_ints = [-1]> ()
  zero = Constant <value_float = 0.0> ()
  one = Constant <value_float = 1.0> ()
  largest = Constant <value_float = 448.0> ()
  minus_largest = Constant <value_float = -448.0> ()
  huge = Constant <value_float = 8.507059173023462e+37> ()
  minus_huge = Constant <value_float = -8.507059173023462e+37> ()
  smallest = Constant <value_float = 0.001953125> ()
  least_scale = Constant <value_float = 7.888609052210118e-31> ()
  down = Constant <value_float = 9.5367431640625e-07> ()
  up = Constant <value_float = 1048576.0> ()
  shift = Constant <value_float = 16777216.0> ()
  sixteenth = Constant <value_float = 0.0625> ()
  saturated = Clip (x, minus_huge, huge)
  blocks = Reshape (saturated, blocked)
  sizes_of = Abs (blocks)
  amax = ReduceMax <keepdims = 1> (sizes_of, last)
  ideal = Div (amax, largest)
  clipped = Clip (ideal, least_scale)
  is_zero = Equal (amax, zero)
  wanted = Where (is_zero, one, clipped)
  small = Mul (wanted, down)
  large = Mul (small, shift)
  sum = Add (large, small)
  step = Sub (sum, large)
  exact = Equal (step, zero)
  power = Where (exact, small, step)
  scale = Mul (power, up)
  scaled = Div (blocks, scale)
  limited = Clip (scaled, minus_largest, largest)
  magnitude = Abs (limited)
  e4m3_small = Mul (magnitude, down)
  e4m3_large = Mul (e4m3_small, shift)
  e4m3_sum = Add (e4m3_large, e4m3_small)
  e4m3_rest = Sub (e4m3_sum, e4m3_large)
  e4m3_exact = Equal (e4m3_rest, zero)
  e4m3_choice = Where (e4m3_exact, e4m3_small, e4m3_rest)
  e4m3_power = Mul (e4m3_choice, up)
  e4m3_free = Mul (e4m3_power, sixteenth)
  e4m3_step = Max (e4m3_free, smallest)
  e4m3_steps = Div (limited, e4m3_step)
  e4m3_rounded = Round (e4m3_steps)
  elements = Mul (e4m3_rounded, e4m3_step)
  result = Mul (elements, scale)
  y = Reshape (result, sizes)
}
"""
_UNPACK_MXFP8 = """
<domain: "vcompress", opset_import: ["" : 20]>
UnpackMxfp8 (codes, exponents, table, blocked, whole) => (y) {
  last = Constant <value_ints = [-1]> ()
  elements = Cast <to = 1> (codes)
  blocks = Reshape (elements, blocked)
  indices = Cast <to = 6> (exponents)
  scale = Gather (table, indices)
  scales = Unsqueeze (scale, last)
  values = Mul (blocks, scales)
  y = Reshape (values, whole)
}
"""


def for_openvino(model: onnx.ModelProto) -> onnx.ModelProto:
    """What `model`, in the TensorRT dialect, is in the one of OpenVINO. `model` is used up.

    Raises:
        BuildError: an operator of the domain `trt` stands in a form that is not ours.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    dropped: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            source = makers.get(node.input[0])
            if source is None or source.op_type != "TRT_FP4DynamicQuantize":
                nodes.append(node)
                continue
            dropped.update((*source.output, node.input[1]))
            shape = _stored(added, np.array([-1, _BLOCK_OF_NVFP4], np.int64))
            nodes.append(_call("RoundNvfp4", [*source.input, shape], node.output[0]))
        elif node.op_type == "TRT_MXFP8DequantizeLinear":
            nodes.append(_mxfp8(node, makers, stored, added))
        else:
            nodes.append(node)
    # What made the codes has no reader any more.
    nodes = [
        node
        for node in nodes
        if node.domain != "trt" and not (node.op_type == "DequantizeLinear" and
        node.output[0] in dropped)
    ]  # fmt: skip
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.values())
    return _inlined(model)


def _mxfp8(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], stored: dict[str, TensorProto],
    added: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:  # fmt: skip
    source = makers.get(node.input[0])
    blocked = _stored(added, np.array([-1, _BLOCK_OF_MX], np.int64))
    if source is not None and source.op_type == "TRT_MXFP8DynamicQuantize":
        return _call("RoundMxfp8", [source.input[0], blocked], node.output[0])
    weight = stored.get(node.input[0])
    if weight is None or len(weight.dims) != 2:
        message = f"{node.name}: {node.op_type} of something that is neither input nor weight"
        raise BuildError(message)
    rows, columns = weight.dims
    shapes = [
        _stored(added, np.array(sizes, np.int64))
        for sizes in ([rows, columns // _BLOCK_OF_MX, _BLOCK_OF_MX], [rows, columns])
    ]
    powers = np.array([*(2.0**exponent for exponent in range(-127, 128)), np.nan], np.float32)
    table = _stored(added, powers, _TABLE)
    return _call("UnpackMxfp8", [*node.input[:2], table, *shapes], node.output[0])


def _stored(
    added: dict[str, onnx.TensorProto], value: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    name: str | None = None,
) -> str:  # fmt: skip
    """The name of an initializer with this value; equal ones are kept once."""
    name = name or f"vcompress_shape_{'x'.join(map(str, value.tolist()))}".replace("-", "m")
    added.setdefault(name, numpy_helper.from_array(value, name))
    return name


def _call(function: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(function, inputs, [output], name=output, domain=_DOMAIN)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with our functions written out; `trt` and they are no longer among its domains."""
    (version,) = (each.version for each in model.opset_import if each.domain == "")
    for text in (_ROUND_NVFP4, _ROUND_MXFP8, _UNPACK_MXFP8):
        function = onnx.parser.parse_function(text)
        function.opset_import[0].version = version
        model.functions.append(function)
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", version), helper.make_opsetid(_DOMAIN, 1)])
    inlined = ir.from_proto(onnx.inliner.inline_local_functions(model))
    keep_behind_concats(inlined)
    common.RemoveUnusedOpsetsPass()(inlined)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(inlined)
    return ir.to_proto(inlined)
