"""Convolutions in INT8 behind a Concat, for OpenVINO.

OpenVINO 2026.4 draws the rounding of a convolution's input through the Concat that the input comes
from, and then computes something else: on a CPU, relative L2 differences of 0.2 to 0.4 from the
graph's meaning, with one or several sources, in two and three dimensions, along any axis. A copy
that it does not know to be one, Max(x, x), keeps the two apart, and the product in integers. Linear
layers are right by themselves.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["keep_behind_concats"]

# Their first input is the data.
_LAYOUT = frozenset({
    "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip


def keep_behind_concats(model: ir.Model) -> None:
    """Put Max(x, x) in front of the rounding of such convolutions' inputs, in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "QuantizeLinear" or not _feeds_convolution(node):
            continue
        value = node.inputs[0]
        if value is None or not _is_from_concat(value):
            continue
        copied = ir.node("Max", [value, value])
        copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, copied)
        node.replace_input_with(0, copied.outputs[0])


def _feeds_convolution(node: ir.Node) -> bool:
    return any(
        reader.op_type == "Conv"
        for dequantize, _ in node.outputs[0].uses()
        for reader, _ in dequantize.outputs[0].uses()
    )


def _is_from_concat(value: ir.Value) -> bool:
    """Whether a Concat and constants are all that `value` is computed from.

    What stands between, such as a bias, is folded into the rounding before that moves.
    """
    node = value.producer()
    while node is not None and node.op_type != "Concat":
        sources = node.inputs[:1] if node.op_type in _LAYOUT else node.inputs
        computed = [
            maker
            for source in sources
            if source is not None
            and (maker := source.producer()) is not None
            and maker.op_type != "Constant"
        ]
        if len(computed) != 1:
            return False
        (node,) = computed
    return node is not None
