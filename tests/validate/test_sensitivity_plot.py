"""The plot of sensitivities."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from vcompress.validate.sensitivity_plot import plot_sensitivities


def size_of(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_it_grows_with_the_layers_and_leaves_nothing_else(tmp_path: Path) -> None:
    heights = []
    for count in (3, 60):
        losses = {f"block.{i}.{'long' * 20}": {"a": 10.0**-i, "b": 1e-3} for i in range(count)}
        plot_sensitivities(losses, "kl_nats", "title", tmp_path / "plot.png")
        heights.append(size_of(tmp_path / "plot.png")[1])
    assert heights[1] > 3 * heights[0]
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    "losses",
    [
        {"layer": {"a": 0.0}},
        {"layer": {"a": math.nan, "b": math.inf}},
        {"layer": {}},
        {"layer": {}, "other": {"a": 1.0}},
        {},
    ],
    ids=str,
)
def test_losses_that_cannot_be_drawn(tmp_path: Path, losses: dict[str, dict[str, float]]) -> None:
    plot_sensitivities(losses, "squared_relative_error", "title", tmp_path / "plot.png")
    assert size_of(tmp_path / "plot.png")[0] > 500


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        plot_sensitivities({"layer": {"a": 1.0}}, "kl_nats", "title", tmp_path / "absent/plot.png")
