"""What a device does to pixels before the model, moved into the graph.

With uint8 inputs all that is left outside is to sample, resize and crop: the mistake of every
second deployment, a wrong scale or order of channels, cannot be made any more. The operators are
those of `calib.preprocess.to_model_input`, in its order and in float32, so the numbers are the same
to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vcompress.spec.clip import ClipSpec, Layout
from vcompress.spec.errors import InputError

__all__ = ["fold_input", "folded_clip"]


def folded_clip(clip: ClipSpec, *, dtype: str, layout: Layout) -> ClipSpec:
    """What is left to be done outside, after `fold_input` with the same arguments."""
    if dtype == "uint8":
        return replace(clip, layout=layout, dtype="uint8", rescale=1, mean=(0.0,), std=(1.0,))
    return replace(clip, layout=layout)


def fold_input(model: onnx.ModelProto, clip: ClipSpec, *, dtype: str, layout: Layout) -> None:
    """Let `model`, whose input is what `clip` says, take inputs of `dtype` and `layout`.

    Args:
        model: has one input of float32; changed in place. Weights in other files stay there.
        clip: of the model as it is.
        dtype: "uint8", or "float32" to change the order of the axes alone.
        layout: of the new input.

    Raises:
        InputError: the model has several inputs, or takes bytes already.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        message = "only a model with one float32 input can take in its preprocessing"
        raise InputError(message)
    (old,) = inputs
    sizes = dict(zip(clip.layout, old.type.tensor_type.shape.dim, strict=True))
    nodes: list[onnx.NodeProto] = []
    value = old.name
    if dtype == "uint8":
        value = _normalised(graph, nodes, value, clip, layout)
    if layout != clip.layout:
        order = [layout.index(axis) for axis in clip.layout]
        nodes.append(helper.make_node("Transpose", [value], ["vcompress_ordered"], perm=order))
        value = "vcompress_ordered"
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old.name:
                node.input[place] = value
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    shape = old.type.tensor_type.shape
    dimensions = [onnx.TensorShapeProto.Dimension() for _ in layout]
    for dimension, axis in zip(dimensions, layout, strict=True):
        dimension.CopyFrom(sizes[axis])
    del shape.dim[:]
    shape.dim.extend(dimensions)
    if dtype == "uint8":
        old.type.tensor_type.elem_type = TensorProto.UINT8


def _normalised(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], value: str, clip: ClipSpec, layout: Layout
) -> str:
    """Add `(x * rescale - mean) / std`; the name of the result."""

    def step(operator: str, factor: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        name = f"vcompress_{operator.lower()}"
        graph.initializer.append(numpy_helper.from_array(factor, f"{name}_by"))
        nodes.append(helper.make_node(operator, [value, f"{name}_by"], [name]))
        return name

    channels = [-1 if axis == "C" else 1 for axis in layout]
    nodes.append(helper.make_node("Cast", [value], ["vcompress_float"], to=TensorProto.FLOAT))
    value = "vcompress_float"
    value = step("Mul", np.array(clip.rescale, np.float32))
    value = step("Sub", np.array(clip.mean, np.float32).reshape(channels))
    return step("Div", np.array(clip.std, np.float32).reshape(channels))
