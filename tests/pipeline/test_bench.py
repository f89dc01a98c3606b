"""The benchmark with real processes; no time is asserted, only what is made of it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vcompress import cli
from vcompress.pipeline import bench
from vcompress.pipeline.bench import Benchmark
from vcompress.pipeline.process_pairs import Arm, measure_pairs
from vcompress.pipeline.run import Silent
from vcompress.spec.errors import BuildError, InputError
from vcompress.validate.regression import Estimate, verdict


@pytest.fixture
def recorded() -> Benchmark:
    return Benchmark(
        artifact="out", onnx_sha256="0" * 64, versus="yardstick", verdict=None,
        ratio=Estimate(log_ratio=0.5, standard_error=0.004, num_pairs=12),
        device={"cpu": "one"}, numpy="2.0", onnxruntime="1.24", created="2026-01-01T00:00:00",
    )  # fmt: skip


def test_fresh_processes_time_the_yardstick_with_more_work() -> None:
    rows = measure_pairs(
        Arm(block_seconds=0.002), Arm(repeat=1000, block_seconds=0.002), 1, Silent(), "pair"
    )
    assert rows.shape == (1, 10)
    # Ten times the work: not equal, however noisy the machine. There is no upper end: what else
    # runs on the core breaks into the longer block more often.
    assert float(sorted(rows[0])[5]) > math.log(2)


def test_a_process_that_ends_early_says_why(tmp_path: Path) -> None:
    missing = Arm(onnx=tmp_path / "none.onnx", inputs=tmp_path / "none.npz")
    with pytest.raises(BuildError, match=r"none\.onnx is not a file"):
        measure_pairs(missing, Arm(), 1, Silent(), "pair")


def test_a_recorded_run_is_a_baseline_and_a_comparison_is_none(
    tmp_path: Path, recorded: Benchmark
) -> None:
    path = tmp_path / "main.json"
    path.write_text(json.dumps(recorded.as_dict()))
    assert Estimate(**bench._read_baseline(path)["ratio"]) == recorded.ratio
    path.write_text(json.dumps(replace(recorded, versus="other/").as_dict()))
    with pytest.raises(InputError, match="without --baseline"):
        bench._read_baseline(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="was not written by"):
        bench._read_baseline(path)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [({}, "regression"), ({"device": {"cpu": "two"}}, "inconclusive"),
     ({"numpy": "1.0"}, "inconclusive")],
)  # fmt: skip
def test_times_of_another_machine_decide_nothing(
    recorded: Benchmark, change: dict[str, object], outcome: str
) -> None:
    stored = {**recorded.as_dict(), **change}
    slower = Estimate(log_ratio=0.1, standard_error=0.004, num_pairs=6)
    run = replace(recorded, verdict=verdict(slower, "regression"))
    found = bench._comparable(run, stored).verdict
    assert found is not None
    assert found.outcome == outcome


@pytest.mark.parametrize("flag", ["--output", "--junit", "--history"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "none" / "file"
    monkeypatch.setattr(sys, "argv", ["vcompress", "bench", str(tmp_path), flag, str(path)])
    code, message = cli._run()
    assert code == 2
    assert f"choose another {flag}" in (message or "")
