from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from vcompress.compress.frozen import freeze
from vcompress.export.dialects.openvino import for_openvino
from vcompress.export.graph import export_onnx
from vcompress.export.openvino_runtime import open_openvino
from vcompress.export.readback import read_precision
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

Exported = Callable[[str, str, str], Any]

# What computes a layer of the format in OpenVINO on a CPU.
KERNELS = {
    "int8": "FullyConnected i8", "nvfp4": "FullyConnected f4e2m1", "int4_g32": "FullyConnected",
    "mxfp8": "FullyConnected", "fp8": "FullyConnected",
}  # fmt: skip


@pytest.mark.parametrize("format", KERNELS)
def test_a_graph_computes_the_same_in_openvino(
    exported: Exported, clips: torch.Tensor, tmp_path: Path, format: str
) -> None:
    made = exported("tiny", format, "tensorrt")
    path = tmp_path / "m.onnx"
    onnx.save(for_openvino(onnx.load(made.path)), path)
    assert read_precision(path).formats == read_precision(made.path).formats
    assert {each.domain for each in onnx.load(path).opset_import} == {""}
    session = open_openvino(path, threads=1)
    assert session.providers == ("CPU",)
    # Two inputs, and a second batch size.
    for batch in (clips, clips[1:2]):
        got = session.run_named({"pixel_values": batch.numpy()})["output"]
        with torch.no_grad():
            wanted = made.module(batch).numpy()
        assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)
    assert any(kernel.startswith(KERNELS[format]) for kernel in session.kernels())


class Joined(nn.Module):
    """A convolution behind a Concat, as in video autoencoders that repeat their first frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(8, 8, 3, padding=(0, 1, 1))
        self.offset = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([clips[:, :, :1], clips, clips[:, :, -1:]], 2)
        return self.conv(joined + self.offset)


def test_a_convolution_behind_a_concat_is_right(tmp_path: Path) -> None:
    """OpenVINO 2026.4 by itself is off by a relative L2 of 0.2 to 0.4."""
    module, clips = Joined().eval(), torch.randn(2, 8, 3, 8, 8)
    module.conv = freeze(module.conv, "int8", 4.0)  # type: ignore[assignment]
    export_onnx(module, clips, tmp_path / "t.onnx", dialect="tensorrt")
    path = tmp_path / "m.onnx"
    onnx.save(for_openvino(onnx.load(tmp_path / "t.onnx")), path)
    session = open_openvino(path, threads=1)
    got = session.run_named({"pixel_values": clips.numpy()})["output"]
    with torch.no_grad():
        wanted = module(clips).numpy()
    assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert [each for each in session.kernels() if each.endswith("8")], "in integers"


def test_rounding_to_nvfp4_is_exact_beside_ties(tmp_path: Path) -> None:
    """The arithmetic against the numbers of `numerics`, on scales from the least to the largest."""
    from vcompress.compress.numerics import nvfp4

    generator = np.random.default_rng(0)
    magnitudes = 2.0 ** generator.uniform(-20, 12, (64, 4, 1))
    x = (generator.normal(size=(64, 4, 16)) * magnitudes).reshape(64, 64).astype(np.float32)
    x[0] = 0
    scale = np.float32(0.37)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["x", "s"], ["c", "b"], domain="trt", axis=-1, block_size=16,
            scale_type=17,
        ),
        helper.make_node("DequantizeLinear", ["b", "s"], ["d"]),
        helper.make_node("DequantizeLinear", ["c", "d"], ["y"], axis=-1, block_size=16),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 64])],
        [value("y", TensorProto.FLOAT, ["n", 64])], [onnx.numpy_helper.from_array(scale, "s")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(for_openvino(helper.make_model(graph, opset_imports=opsets, ir_version=11)), path)
    got = open_openvino(path, threads=1).run_named({"x": x})["y"]
    wanted = nvfp4.quantize_dequantize(torch.from_numpy(x), torch.tensor(scale)).numpy()
    np.testing.assert_array_equal(got, wanted)


def test_what_openvino_cannot_do_is_said(exported: Exported, tmp_path: Path) -> None:
    path = exported("tiny", "int8", "portable").path
    with pytest.raises(MissingCapabilityError, match=r"OpenVINO has no device GPU\.7"):
        open_openvino(path, device="GPU.7")
    with pytest.raises(InputError, match="is not a file"):
        open_openvino(tmp_path / "none.onnx")
    with pytest.raises(BuildError, match="cannot load"):
        open_openvino(exported("tiny", "nvfp4", "tensorrt").path)
    session = open_openvino(path, threads=1)
    with pytest.raises(InputError, match="takes float32 as input pixel_values, got float64"):
        session.run_named({"pixel_values": np.zeros((1, 2))})
    with pytest.raises(InputError, match="needs the inputs pixel_values"):
        session.run_named({})


def test_an_empty_answer_of_openvino_is_an_error(exported: Exported, clips: torch.Tensor) -> None:
    """Seen with OpenVINO 2026.4: Cast to FLOAT8E4M3FN with a free batch gives no values."""
    session = open_openvino(exported("tiny", "nvfp4", "portable").path, threads=1)
    with pytest.raises(BuildError, match="vcompress export ARTIFACT --runtime openvino"):
        session.run_named({"pixel_values": clips.numpy()})
