"""Exports that were broken on purpose: validation sees each, and finds the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from vcompress.export.locate import locate
from vcompress.export.runtime import open_session
from vcompress.export.ties import count_ties
from vcompress.pipeline.equivalence import PLANNED_TOLERANCE, TIE_TOLERANCE
from vcompress.validate.parity import check_parity

Exporter = Callable[[str, str, str], Any]
Graph = onnx.GraphProto


def stored(graph: Graph, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def change(graph: Graph, name: str, edit: Callable[[Any], Any]) -> None:
    """Replace a stored tensor by what `edit` makes of it."""
    tensor = stored(graph, name)
    before = numpy_helper.to_array(tensor).copy()
    after = np.ascontiguousarray(edit(before.copy())).astype(before.dtype)
    assert not np.array_equal(after, before)
    tensor.CopyFrom(numpy_helper.from_array(after, name))


def swap(graph: Graph, first: str, second: str) -> None:
    one, other = (numpy_helper.to_array(stored(graph, name)).copy() for name in (first, second))
    change(graph, first, lambda _: other)
    change(graph, second, lambda _: one)


def node(graph: Graph, kind: str, number: int = 0) -> onnx.NodeProto:
    return [each for each in graph.node if each.op_type == kind][number]


def reading(graph: Graph, weight: str) -> onnx.NodeProto:
    """The product with the weight that the DequantizeLinear of `weight` gives."""
    (value,) = [each.output[0] for each in graph.node if weight in each.input]
    return next(each for each in graph.node if value in each.input)


def rolled(x: Any) -> Any:
    return np.roll(x, 1, axis=-1)


def flip_one_sign(codes: Any) -> Any:
    place = np.unravel_index(np.abs(codes.astype(int)).argmax(), codes.shape)
    codes[place] = -codes[place]
    return codes


def drop_rounding(graph: Graph) -> None:
    product = reading(graph, "out.weight_quantized")
    product.input[0] = node(graph, "Gelu").output[0]


def move_zero_point(graph: Graph) -> None:
    product = reading(graph, "out.weight_quantized")
    (dequantize,) = [each for each in graph.node if product.input[0] in each.output]
    graph.initializer.append(numpy_helper.from_array(np.array(129, np.uint8), "moved"))
    dequantize.input[2] = "moved"


def drop_bias(graph: Graph) -> None:
    (adds,) = [each for each in graph.node if "out.bias" in each.input]
    for reader in graph.node:
        for index, name in enumerate(reader.input):
            if name == adds.output[0]:
                reader.input[index] = adds.input[0]
    graph.node.remove(adds)


def fold_index(graph: Graph) -> None:
    """Keys are read where queries are."""
    query, key = node(graph, "Slice", 0), node(graph, "Slice", 1)
    key.input[1], key.input[2] = query.input[1], query.input[2]


def wrong_activation(graph: Graph) -> None:
    node(graph, "Gelu").op_type = "Relu"
    del node(graph, "Relu").attribute[:]


def drop_residual(graph: Graph) -> None:
    add = node(graph, "Add", -1)
    node(graph, "ReduceMean").input[0] = add.input[1]


def softmax_over_queries(graph: Graph) -> None:
    softmax = node(graph, "Softmax")
    del softmax.attribute[:]
    softmax.attribute.append(helper.make_attribute("axis", -2))


def lose_scale_of_scores(graph: Graph) -> None:
    change(graph, node(graph, "Mul").input[1], lambda scale: scale * 2)


def wrong_epsilon(graph: Graph) -> None:
    norm = node(graph, "LayerNormalization")
    kept = [each for each in norm.attribute if each.name != "epsilon"]
    del norm.attribute[:]
    norm.attribute.extend([*kept, helper.make_attribute("epsilon", 0.1)])


def blue_first(graph: Graph) -> None:
    """Channels in the other order."""
    first = node(graph, "Transpose")
    graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "channels"))
    gather = helper.make_node("Gather", [first.input[0], "channels"], ["turned"], axis=2)
    graph.node.insert(0, gather)
    first.input[0] = "turned"


def exchange_nibbles(packed: Any) -> Any:
    return (packed >> 4) | (packed << 4)


# Name -> (format of the file, the layer to blame, what about it, the fault).
FAULTS: dict[str, tuple[str, str, str, Callable[[Graph], None]]] = {
    "sign of a weight": (
        "int8", "qkv", "weight", lambda g: change(g, "qkv.weight_quantized", np.negative)
    ),
    "sign of one value": (
        "int8", "head", "weight", lambda g: change(g, "head.weight_quantized", flip_one_sign)
    ),
    "transposed weight": (
        "int8", "out", "weight", lambda g: change(g, "out.weight_quantized", np.transpose)
    ),
    "scales of two layers swapped": (
        "int8", "stem", "weight", lambda g: swap(g, "stem.weight_scale", "out.weight_scale")
    ),
    "scales of channels moved by one": (
        "int8", "out", "weight", lambda g: change(g, "out.weight_scale", rolled)
    ),
    "scale of an input": (
        "int8", "qkv", "input", lambda g: change(g, "qkv.input_scale", lambda x: x * 1.5)
    ),
    "zero point off by one": ("int8", "out", "input", move_zero_point),
    "rounding dropped": ("int8", "out", "input", drop_rounding),
    "bias dropped": ("int8", "out", "bias", drop_bias),
    "biases of two layers swapped": (
        "int8", "stem", "bias", lambda g: swap(g, "stem.bias", "out.bias")
    ),
    "index folded into a constant": ("int8", "out", "input", fold_index),
    "another activation": ("int8", "out", "input", wrong_activation),
    "residual dropped": ("int8", "head", "input", drop_residual),
    "softmax over another axis": ("int8", "out", "input", softmax_over_queries),
    "scale of scores": ("int8", "out", "input", lose_scale_of_scores),
    "epsilon lost": ("int8", "qkv", "input", wrong_epsilon),
    "channels in the other order": ("int8", "stem", "input", blue_first),
    "nibbles exchanged": (
        "nvfp4", "qkv", "weight", lambda g: change(g, "qkv.weight_packed", exchange_nibbles)
    ),
    "scales of blocks moved by one": (
        "nvfp4", "out", "weight", lambda g: change(g, "out.weight_block_scale", rolled)
    ),
    "scale of a tensor": (
        "nvfp4", "head", "weight", lambda g: change(g, "head.weight_tensor_scale", lambda x: 2 * x)
    ),
    "scale of an input of blocks": (
        "nvfp4", "out", "input", lambda g: change(g, "out.input_scale", lambda x: x * 1.3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_seen_and_located(
    exported: Exporter, clips: torch.Tensor, tmp_path: Path, fault: str
) -> None:
    format, layer, what, damage = FAULTS[fault]
    made = exported("tiny", format, "portable")
    broken = onnx.load(made.path)
    damage(broken.graph)
    path = tmp_path / "broken.onnx"
    onnx.save(broken, path)
    session = open_session(path)
    result = check_parity(
        lambda x: made.module(x).detach().numpy(), lambda x: session.run(x.numpy()),
        [clips[:1], clips[1:2]], tolerance=PLANNED_TOLERANCE, tie_tolerance=TIE_TOLERANCE,
        find_tie=lambda x: count_ties(made.module, path, x).explanation(), equal=torch.equal,
    )  # fmt: skip
    assert result.verdict == "fail"
    found = locate(made.module, path, clips[:1])
    assert found.first is not None
    assert (found.first.layer, found.first.what) == (layer, what), found.departures
    assert layer in str(found.first)


@pytest.mark.parametrize("format", ["int8", "nvfp4", "fp8", "int4_g32"])
def test_a_right_file_departs_nowhere(exported: Exporter, clips: torch.Tensor, format: str) -> None:
    made = exported("tiny", format, "portable")
    found = locate(made.module, made.path, clips)
    assert found.num_layers == 4
    assert found.departures == ()


def test_a_float_layer_is_looked_at_too(
    exported: Exporter, clips: torch.Tensor, tmp_path: Path
) -> None:
    made = exported("tiny", "float", "portable")
    assert locate(made.module, made.path, clips).departures == ()
    broken = onnx.load(made.path)
    (weight,) = [t.name for t in broken.graph.initializer if t.name.startswith("out.weight")]
    change(broken.graph, weight, np.transpose)
    path = tmp_path / "broken.onnx"
    onnx.save(broken, path)
    first = locate(made.module, path, clips).first
    assert first is not None
    assert (first.layer, first.what) == ("out", "weight")
