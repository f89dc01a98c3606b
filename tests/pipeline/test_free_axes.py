"""Graphs with free frames, heights and widths, and models that have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vcompress import Options, quantize
from vcompress.export.runtime import open_session
from vcompress.export.shape_profiles import ShapeProfile, profiles_around
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.video import VideoModel
from vcompress.spec.errors import BuildError, InputError

SPEC = "NCTHW:float32:1x3x4x16x16"


class Network(nn.Module):
    """Convolutions and a mean, which take any size; or positions, which do not."""

    def __init__(self, *, has_positions: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1, stride=2)
        self.second = nn.Conv3d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        self.positions = nn.Parameter(torch.randn(1, 16, 128)) if has_positions else None

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        features = self.second(torch.relu(self.first(clips))).flatten(2)
        if self.positions is not None:
            features = features + self.positions
        return self.head(features.mean(-1))


def model_of(*, has_positions: bool = False) -> VideoModel:
    torch.manual_seed(0)
    module = Network(has_positions=has_positions).eval()
    return wrap_module(module, name="network", options=LoadOptions(input_spec=SPEC))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clips.npz"
    frames = np.random.default_rng(0).integers(0, 255, (12, 4, 16, 16, 3), dtype=np.uint8)
    np.savez(path, clips=frames)
    return str(path)


def options_of(clips: str, output: Path, *axes: str) -> Options:
    return Options(target="int8", calib=clips, output=output, engine=False, dynamic=axes)


def test_free_axes_hold_at_other_sizes(clips: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model_of(), options=options_of(clips, output, "frames", "height", "width"))
    for name in ("model.onnx", "model.tensorrt.onnx"):
        value = onnx.load(output / name).graph.input[0].type.tensor_type.shape
        named = [axis.dim_param or axis.dim_value for axis in value.dim]
        assert named == ["batch", 3, "frames", "height", "width"]
    session = open_session(output / "model.onnx")
    answer = session.run(np.zeros((2, 3, 6, 24, 40), np.float32))
    assert answer.shape == (2, 5)
    report = json.loads((output / "report.json").read_text())
    assert "--optShapes=pixel_values:1x3x4x16x16" in report["engines"][0]["command"]
    assert "--maxShapes=pixel_values:8x3x8x32x32" in report["engines"][0]["command"]


def test_a_size_that_the_model_itself_does_not_take_is_said(clips: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="height") as caught:
        quantize(
            model_of(has_positions=True), options=options_of(clips, tmp_path / "out", "height")
        )
    assert "leave out" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_free_is_refused_at_once(clips: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'widht'; did you mean 'width'"):
        quantize(model_of(), options=options_of(clips, tmp_path / "out", "widht"))


def test_profiles_go_from_the_typical_sizes_to_twice_of_them(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("clips", 1, ["batch", 3, "frames", 8, "width"])
    fixed = onnx.helper.make_tensor_value_info("other", 1, ["batch", 7])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["clips"], ["out"])], "graph", [value, fixed],
        [onnx.helper.make_tensor_value_info("out", 1, None)],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    sizes = {"clips": (1, 3, 4, 8, 10), "other": (1, 7), "unknown": (1,)}
    profile = ShapeProfile(
        minimum=(1, 3, 4, 8, 10), optimum=(1, 3, 4, 8, 10), maximum=(8, 3, 8, 8, 20)
    )
    assert profiles_around(tmp_path / "x.onnx", sizes) == {"clips": profile}
