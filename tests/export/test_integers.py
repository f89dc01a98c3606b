"""Integer operators in the TensorRT dialect: the same numbers, and an engine that builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vcompress.export.engine import build_engine
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.spec.errors import BuildError


class Histogram(nn.Module):
    """Frames as bytes `[B, T, H, W, 3]` to histograms of 512 colours `[B, T, 512]`."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.permute(0, 1, 4, 2, 3).flatten(3)
        red, green, blue = (pixels[:, :, index].int() >> 5 for index in range(3))
        bins = ((red << 6) + (green << 3) + blue).long()
        counts = torch.zeros(*bins.shape[:2], 512, dtype=torch.int32)
        counts.scatter_add_(2, bins, torch.ones_like(bins, dtype=torch.int32))
        return counts.float() / pixels.shape[-1]


class Shifts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = x.int()
        return torch.stack([number << 3, number >> 2, number >> 1]).float()


class OtherAxis(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = (x[:2] > 0).long()
        return torch.zeros_like(x).scatter_add(0, index, x[:2])


def test_a_histogram_of_bytes_is_the_same_and_builds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 4, 6, 8, 3), dtype=torch.uint8, generator=generator)
    module = Histogram().eval()
    path = tmp_path / "histogram.onnx"
    export_onnx(module, frames, path, dialect="tensorrt")
    session = open_session(path, threads=1)
    for clip in (frames, 255 - frames):
        (counts,) = session.run_named({session.input_names[0]: clip.numpy()}).values()
        assert torch.equal(torch.from_numpy(counts), module(clip))
    facts = build_engine(path, tmp_path / "histogram.engine", sm="120")
    assert facts.inputs[0].dtype == "uint8"


def test_shifts_round_down_below_zero_too(tmp_path: Path) -> None:
    x = torch.arange(-9, 10).float()[None]
    path = tmp_path / "shifts.onnx"
    export_onnx(Shifts(), x, path, dialect="tensorrt", dynamic_batch=False)
    session = open_session(path, threads=1)
    (got,) = session.run_named({session.input_names[0]: x.numpy()}).values()
    assert torch.equal(torch.from_numpy(got), Shifts()(x))
    build_engine(path, tmp_path / "shifts.engine", sm="120")


def test_sums_along_another_axis_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="along another axis than the last"):
        export_onnx(OtherAxis(), torch.randn(4, 3), tmp_path / "x.onnx", dialect="tensorrt",
                    dynamic_batch=False)  # fmt: skip
