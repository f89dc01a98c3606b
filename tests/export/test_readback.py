from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vcompress.compress.frozen import FrozenLayer, freeze
from vcompress.export.graph import export_onnx
from vcompress.export.readback import read_precision
from vcompress.spec.errors import InputError

Exporter = Callable[[str, str, str], Any]


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_every_layer_is_found(exported: Exporter, format: str, dialect: str) -> None:
    made = exported("tiny", format, dialect)
    found = read_precision(made.path)
    expected = {
        name: layer.format
        for name, layer in made.module.named_modules()
        if isinstance(layer, FrozenLayer)
    }
    assert found.formats == expected
    assert found.counts == ({"int8": 1, "nvfp4": 3} if format == "nvfp4" else {format: 4})
    assert found.unnamed == {}
    assert found.layers["stem"].operators == ("Conv",)


@pytest.mark.parametrize("name", ["videomae", "vivit"])
@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
def test_transformers_models(exported: Exporter, name: str, dialect: str) -> None:
    made = exported(name, "nvfp4", dialect)
    found = read_precision(made.path, prefix="model.")
    expected = {
        layer_name.removeprefix("model."): layer.format
        for layer_name, layer in made.module.named_modules()
        if isinstance(layer, FrozenLayer)
    }
    assert found.formats == expected
    assert len(expected) == 14


def test_layers_that_were_kept(exported: Exporter) -> None:
    found = read_precision(exported("tiny", "float", "portable").path)
    assert found.formats == dict.fromkeys(("stem", "qkv", "out", "head"), "float")
    # Attention multiplies two activations: no layer.
    assert found.unnamed == {}
    assert set(found.initializer_bytes) == {"float", "int64"}


def test_bytes_by_type(exported: Exporter) -> None:
    # qkv, out and head have 192 x 64, 64 x 64 and 5 x 64 values of half a byte, a scale for 16.
    values = (192 + 64 + 5) * 64
    native = read_precision(exported("tiny", "nvfp4", "tensorrt").path).initializer_bytes
    assert native["float4e2m1"] == values // 2
    assert native["float8e4m3fn"] == values // 16
    assert native["int8"] == 64 * 3 * 2 * 4 * 4 + 1  # the stem and its zero point
    portable = read_precision(exported("tiny", "nvfp4", "portable").path).initializer_bytes
    # A zero point may be stored as uint8, too.
    assert 0 <= portable["uint8"] - values // 2 <= 1


def test_external_data_is_not_needed(
    exported: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcompress.export.graph.EXTERNAL_DATA_BYTES", 1000)
    module = nn.Sequential(freeze(nn.Linear(64, 64), "nvfp4", 4.0))
    export_onnx(module, torch.randn(2, 64), tmp_path / "m.onnx", dialect="tensorrt")
    (tmp_path / "m.onnx.data").unlink()
    assert read_precision(tmp_path / "m.onnx").formats == {"0": "nvfp4"}


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.shared = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(x)))


def test_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    module = Twice(freeze(nn.Linear(16, 16), "int8", 4.0))
    export_onnx(module, torch.randn(2, 16), tmp_path / "m.onnx", dialect="portable")
    found = read_precision(tmp_path / "m.onnx").layers["shared"]
    assert found.format == "int8"
    assert len(found.operators) == len(set(found.input_values)) == 2


def edited(source: Path, path: Path, edit: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(source)
    edit(model.graph)
    onnx.save(model, path)
    return path


def stored(graph: onnx.GraphProto, name: str) -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def test_contradicts_a_plan_when_a_weight_was_folded(exported: Exporter, tmp_path: Path) -> None:
    # What an optimizer does that folds DequantizeLinear: the weight is float again.
    def fold(graph: onnx.GraphProto) -> None:
        dequantizer = next(
            node for node in graph.node if node.input[:1] == ["out.weight_quantized"]
        )
        codes = numpy_helper.to_array(stored(graph, "out.weight_quantized")).astype(np.float32)
        scale = numpy_helper.to_array(stored(graph, "out.weight_scale"))
        folded = numpy_helper.from_array(codes * scale[:, None], "out.weight")
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == dequantizer.output[0]:
                    node.input[index] = "out.weight"
        graph.node.remove(dequantizer)
        graph.initializer.append(folded)

    path = edited(exported("tiny", "int8", "portable").path, tmp_path / "m.onnx", fold)
    found = read_precision(path)
    assert found.layers["out"].weight_format == "float"
    assert found.formats["out"] == "float weight with int8 input"
    assert found.formats["qkv"] == "int8"


@pytest.mark.parametrize(("format", "removed"), [("int8", "QuantizeLinear"), ("nvfp4", "Round")])
def test_contradicts_a_plan_when_an_input_is_float(
    exported: Exporter, tmp_path: Path, format: str, removed: str
) -> None:
    found = read_precision(exported("tiny", format, "portable").path)
    values = found.layers["qkv"].input_values

    def bypass(graph: onnx.GraphProto) -> None:
        # The layer reads what it normalises, before any quantization.
        norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name in values:
                    node.input[index] = norm.output[0]

    path = edited(exported("tiny", format, "portable").path, tmp_path / "m.onnx", bypass)
    assert any(node.op_type == removed for node in onnx.load(path).graph.node)
    assert read_precision(path).formats["qkv"] == f"{format} weight with float input"


@pytest.mark.parametrize(("zero_point", "format"), [(128, "int8"), (127, "unknown")])
def test_unsigned_codes_are_int8_around_128_alone(
    tmp_path: Path, zero_point: int, format: str
) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["fc.weight", "s"], ["w"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.uint8(zero_point), "z"),
        numpy_helper.from_array(np.ones((4, 3), np.int8), "fc.weight"),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = read_precision(tmp_path / "m.onnx").layers["fc"]
    assert (found.weight_format, found.input_format) == ("int8", format)


@pytest.mark.parametrize(
    ("block_size", "scale_type", "format"),
    [
        (16, TensorProto.FLOAT8E4M3FN, "nvfp4"),
        (32, TensorProto.FLOAT8E4M3FN, "unknown"),  # blocks of another size
        (16, TensorProto.FLOAT8E5M2, "unknown"),  # scales of another type
    ],
)
def test_four_bits_alone_are_not_nvfp4(
    tmp_path: Path, block_size: int, scale_type: int, format: str
) -> None:
    num_blocks = 32 // block_size
    nodes = [
        helper.make_node("DequantizeLinear", ["s", "g"], ["scale"]),
        helper.make_node(
            "DequantizeLinear", ["fc.weight", "scale"], ["w"], axis=0, block_size=block_size
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = [
        helper.make_tensor("fc.weight", TensorProto.FLOAT4E2M1, [32, 8], bytes(128), raw=True),
        helper.make_tensor("s", scale_type, [num_blocks, 8], bytes(num_blocks * 8), raw=True),
        helper.make_tensor("g", TensorProto.FLOAT, [], [1.0]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert read_precision(tmp_path / "m.onnx").layers["fc"].weight_format == format


def test_weight_without_a_layer_name(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "val_3"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "val_3")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = read_precision(tmp_path / "m.onnx")
    assert found.layers == {}
    assert found.unnamed["val_3"].format == "float"


@pytest.mark.parametrize("content", [None, b"", b"not onnx at all"])
def test_what_is_not_onnx(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        read_precision(path)


def _set_block_size(graph: onnx.GraphProto, operator: str) -> None:
    for node in graph.node:
        if node.op_type == operator:
            for attribute in node.attribute:
                if attribute.name == "block_size":
                    attribute.i = 16


def _static_token_scale(graph: onnx.GraphProto) -> None:
    """Multiply by a constant in place of the token's own scale."""
    (product,) = [node for node in graph.node if node.op_type == "Mul"]
    graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    product.input[1] = "two"


def _other_blocks(graph: onnx.GraphProto) -> None:
    """Let the input be reshaped to blocks of 16; the file need not run."""
    (scaled,) = [node for node in graph.node if node.op_type == "ReduceMax"]
    (absolute,) = [node for node in graph.node if node.output[0] == scaled.input[0]]
    (reshape,) = [node for node in graph.node if node.output[0] == absolute.input[0]]
    sizes = numpy_helper.to_array(stored(graph, reshape.input[1])).copy()
    sizes[-2:] = sizes[-2] * 2, 16
    graph.initializer.append(numpy_helper.from_array(sizes, "sizes"))
    reshape.input[1] = "sizes"


@pytest.mark.parametrize(
    ("format", "dialect", "edit", "expected"),
    [
        (
            "mxfp8", "tensorrt", lambda graph: _set_block_size(graph, "TRT_MXFP8DynamicQuantize"),
            ("mxfp8", "unknown"),
        ),
        (
            "mxfp8", "tensorrt", lambda graph: _set_block_size(graph, "TRT_MXFP8DequantizeLinear"),
            ("unknown", "unknown"),
        ),
        (
            "int4_g64", "tensorrt", lambda graph: _set_block_size(graph, "DequantizeLinear"),
            ("unknown", "float"),
        ),
        ("mxfp4", "portable", _other_blocks, ("mxfp4", "unknown")),
        ("mxfp8", "portable", _other_blocks, ("mxfp8", "unknown")),
        ("int8_token", "portable", _static_token_scale, ("int8", "float")),
    ],
)  # fmt: skip
def test_a_changed_file_contradicts_the_plan(
    tmp_path: Path, format: str, dialect: str, edit: Callable[[onnx.GraphProto], None],
    expected: tuple[str, str],
) -> None:  # fmt: skip
    module = nn.Sequential(freeze(nn.Linear(64, 64), format, None))
    export_onnx(module, torch.randn(2, 64), tmp_path / "whole.onnx", dialect=dialect)
    assert read_precision(tmp_path / "whole.onnx").formats == {"0": format}
    found = read_precision(edited(tmp_path / "whole.onnx", tmp_path / "m.onnx", edit))
    assert (found.layers["0"].weight_format, found.layers["0"].input_format) == expected
    assert found.formats["0"] != format
