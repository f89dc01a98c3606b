"""Profiles of real modules: everything is accounted for, under the right name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vcompress import cli
from vcompress.benchmarks import denoiser_zoo
from vcompress.models import load
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.profile import profile_model
from vcompress.validate.profile import CLASSES, Profile

TIMESFORMER: dict[str, Any] = {
    "image_size": 16, "num_frames": 3, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 5, "patch_size": 4, "num_hidden_layers": 2,
}  # fmt: skip


def timesformer() -> VideoModel:
    (adapter,) = [each for each in load.ADAPTERS if each.family == "timesformer"]
    torch.manual_seed(0)
    checkpoint = load.checkpoints.Checkpoint(
        family="timesformer", config=TIMESFORMER,
        state_dict=adapter.build(TIMESFORMER).state_dict(),
    )  # fmt: skip
    return load.from_checkpoint(checkpoint, name="t", source="t", options=LoadOptions())


def check(found: Profile, model: VideoModel) -> None:
    """Times add up to the calls, operations to those of torch, and classes are known."""
    assert sum(found.classes.values()) == pytest.approx(found.profiled_seconds, rel=1e-6)
    assert sum(layer.seconds for layer in found.layers) == pytest.approx(
        found.profiled_seconds, rel=1e-6
    )
    assert set(found.classes) <= set(CLASSES)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(model.example(found.batch_size))
    assert sum(layer.operations for layer in found.layers) == counter.get_total_flops()
    by_name = {layer.name: layer for layer in found.layers}
    for name, facts in model.layers.items():
        assert by_name[name].kind == ("linear" if facts.kind == "linear" else "convolution")


def test_space_and_time_stand_apart() -> None:
    model = timesformer()
    found = profile_model(model, batch_size=2)
    check(found, model)
    assert {"spatial attention", "temporal attention", "linear"} <= set(found.classes)
    kinds = {layer.kind for layer in found.layers if "temporal_attention" in layer.name}
    assert kinds <= {"temporal attention", "linear", "rest"}
    lengths = {layer.tokens for layer in found.layers if layer.kind == "temporal attention"}
    assert lengths == {3}
    # Sixteen places and the class token.
    lengths = {layer.tokens for layer in found.layers if layer.kind == "spatial attention"}
    assert lengths == {17}
    assert "reduce tokens" in {each.technique for each in found.ceilings}


def test_a_denoiser_has_attention_to_the_text(tmp_path: Path) -> None:
    module = denoiser_zoo.build("WanTransformer3DModel")
    module.save_pretrained(tmp_path / "wan")  # type: ignore[operator]
    denoiser_zoo.record("WanTransformer3DModel", module, tmp_path / "calls.pt")
    model = load_model(str(tmp_path / "wan"), LoadOptions(calls=tmp_path / "calls.pt"))
    found = profile_model(model)
    assert sum(found.classes.values()) == pytest.approx(found.profiled_seconds, rel=1e-6)
    assert {"attention", "cross attention"} <= set(found.classes)
    assert "cache blocks over steps" in {each.technique for each in found.ceilings}


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    arguments = ["vcompress", "profile", "reference:penvideo20", "-o", str(path), "--quiet"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli._run() == (0, None)
    data = json.loads(path.read_text())
    assert data["command"] == "profile"
    assert {"linear", "convolution", "attention"} <= set(data["classes"])
    attentions = [each for each in data["layers"] if each["kind"] == "attention"]
    # Two products of 128 tokens by 128 tokens over 128 channels, in each of four blocks.
    assert [each["operations"] for each in attentions] == [4 * 128**3] * 4
    printed = capsys.readouterr().out
    # Which layers took longest is the machine's to say; what is printed are those of the file.
    longest = max(data["layers"], key=lambda each: each["seconds"])
    shown = longest["name"][-30:] or "(the model itself)"
    for word in ("linear", shown, "quantize linears", "reduce tokens"):
        assert word in printed
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--json", "--quiet"])
    assert cli._run() == (0, None)
    assert json.loads(capsys.readouterr().out)["model"] == "penvideo20"
