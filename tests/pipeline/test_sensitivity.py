"""`vcompress sensitivity` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vcompress
from vcompress import cli
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.pipeline.sensitivity import sensitivity
from vcompress.spec.errors import InputError

SOURCE = "reference:penvideo20"
PNG = b"\x89PNG\r\n\x1a\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and error message of `vcompress sensitivity ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["vcompress", "sensitivity", *map(str, arguments)])
    code, message = cli._run()
    return code, message or ""


class Small(nn.Module):
    """Dead channels, a layer with zeros for input, one that cannot be quantized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padded = nn.Conv3d(3, 3, 3, padding=1, padding_mode="circular")
        self.first, self.zeros, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.first(self.padded(clips).flatten(3).mean((1, 2)))
        x = torch.cat([x[..., :16].relu(), 0 * x[..., 16:]], -1)
        return self.head(x + self.zeros(0 * x))


@pytest.fixture
def small(tmp_path: Path) -> tuple[vcompress.models.video.VideoModel, str]:
    clips = np.random.default_rng(0).integers(0, 256, (24, 4, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "clips.npz", clips=clips)
    load = LoadOptions(input_spec="NCTHW:float32:1x3x4x8x8")
    return wrap_module(Small(), name="small", options=load), str(tmp_path / "clips.npz")


def test_a_table_and_a_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    code, message = run(
        monkeypatch, SOURCE, "--calib", SOURCE, "--num-clips", 16, "-o", plot, "--quiet"
    )
    assert code == 0, message
    printed = capfd.readouterr().out
    assert "kl_nats with one layer alone in the format, predicted from 16 clips" in printed
    for word in ("nvfp4", "mxfp8", "fp8", "int8", "conv3d", "classifier"):
        assert word in printed
    assert f"wrote    {plot}" in printed.replace("\n", "") or plot.name in printed
    assert plot.read_bytes().startswith(PNG)
    assert [each.name for each in tmp_path.iterdir()] == ["plot.png"]


def test_json_and_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        SOURCE, "--calib", SOURCE, "--num-clips", 8, "--check", "--formats", "nvfp4, int8",
        "-o", tmp_path / "plot.png", "--quiet",
    )  # fmt: skip
    code, message = run(monkeypatch, *arguments, "--json")
    assert code == 0, message
    table: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert table["command"] == "sensitivity"
    assert set(table["predicted"]) == set(table["measured"]) == set(table["kinds"])
    assert table["agreement"]["spearman"] > 0.85
    assert table["agreement"]["num_pairs"] == sum(map(len, table["predicted"].values()))
    assert table["agreement"]["regret"] >= -1e-9
    assert set(table["agreement"]["spearman_by_format"]) == {"nvfp4", "int8"}
    assert table["num_clips"] == {"calibration": 8, "prediction": 8}
    assert table["unreached"] == []


def test_check_is_printed_also_where_few_bits_are_not_possible(
    small: tuple[Any, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from vcompress.terminal.console import Console

    model, clips = small
    table = sensitivity(
        model, options=vcompress.Options(target="mixed", calib=clips), check=True,
        formats=("int8", "fp8"), plot=tmp_path / "plot.png",
    )  # fmt: skip
    assert table.agreement is not None
    assert table.agreement.regret_bits > 8
    Console(as_json=False, quiet=True).sensitivity(table, tmp_path / "plot.png")
    printed = capfd.readouterr().out
    assert f"check    Spearman {table.agreement.spearman:.3f} over 6 pairs" in printed
    # A layer that can have none of the formats stands in the table, without numbers.
    assert table.predicted["padded"] == {}
    assert "padded" in printed
    # Exact zeros are exact in every format.
    assert table.predicted["zeros"]["int8"] < 1e-9 + table.predicted["first"]["int8"]
    json.dumps(table.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--formats", "nvfp5"], "unknown format 'nvfp5'; did you mean"),
        (["--formats", "nvfp4,"], "unknown format ''"),
        (["-o", "absent/plot.png"], "there is no folder"),
        (["-o", "."], "is a folder; choose another --output"),
        (["--calib", "absent"], "absent: no such file"),
    ],
)
def test_wrong_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = run(monkeypatch, SOURCE, "--calib", SOURCE, "--num-clips", 8, *arguments)
    assert code == 2
    assert expected in message
    assert list(tmp_path.iterdir()) == []


def test_losses_that_are_not_finite_are_json_too(small: tuple[Any, str]) -> None:
    from dataclasses import replace

    model, clips = small
    table = sensitivity(model, options=vcompress.Options(target="int8", calib=clips))
    broken = replace(table, predicted={"first": {"int8": float("inf"), "fp8": float("nan")}})
    assert broken.as_dict()["predicted"] == {"first": {"int8": None, "fp8": None}}


def test_clips_that_all_hold_nan_are_refused(small: tuple[Any, str], tmp_path: Path) -> None:
    model, _ = small
    data = np.random.default_rng(0).normal(size=(8, 3, 4, 8, 8)).astype("f4")
    data[:, 0, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", clips=data)
    options = vcompress.Options(target="mixed", calib=str(tmp_path / "nan.npz"))
    with pytest.raises(InputError, match="clips must be finite"):
        sensitivity(model, options=options)
