"""The GPU suite runs from end to end in small on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vcompress.benchmarks.gpu.suite import main


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton's interpreter takes minutes for this.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("vcompress.pipeline.device_timing._SHORTEST", 0.0)
    path = tmp_path / "gpu.json"
    results = main(["--device", "cpu", "--tiny", "--output", str(path)])
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["parity", "gemm", "wan-1.3b", "cogvideox-2b", "vit-l"]
    assert sections["parity"]["nvfp4"]["values_that_differ"] == 0
    assert sections["parity"]["mxfp8"]["values_that_differ"] == 0
    assert len(sections["gemm"]["rows"]) == 9
    weights = {
        way: found["resident_weight_bytes"]
        for way, found in results["sections"]["wan-1.3b"].items()
        if isinstance(found, dict)
    }
    assert weights["nvfp4 compiled"] < 0.5 * weights["bfloat16"]
