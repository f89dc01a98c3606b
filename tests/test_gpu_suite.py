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
    main(["--device", "cpu", "--tiny", "--output", str(path)])
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["parity", "gemm", "wan-1.3b", "cogvideox-2b", "vit-l", "quality"]
    assert sections["parity"]["nvfp4"]["values_that_differ"] == 0
    assert sections["parity"]["mxfp8"]["values_that_differ"] == 0
    assert len(sections["gemm"]["rows"]) == 9
    wan = sections["wan-1.3b"]["ways"]
    assert wan["nvfp4"]["resident_weight_bytes"] < 0.8 * wan["bfloat16"]["resident_weight_bytes"]
    assert wan["fp8_channel + cache + tokens"]["skip_rate"] == 0.4
    assert "call" in sections["vit-l"]["ways"]["fp8_channel + tokens"]
    trained = sections["quality"]["ways"]
    assert trained["fp8_channel + cache"]["psnr_db"] > 14
    assert trained["fp8_channel + cache"]["skip_rate"] == 0.4
