"""Plans with every format, rotations and calibrated tensors: written, edited, applied."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import vcompress
from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.tensors import ModelTensors, words
from vcompress.export.readback import read_precision
from vcompress.models.load import LoadOptions, load_model, wrap_module
from vcompress.models.video import VideoModel
from vcompress.pipeline.order import write_plan
from vcompress.pipeline.planning import apply_plan, read_plan, save_plan
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.plan import CompressionPlan, LayerChoice

# Edits of one line each, of a plan that keeps every layer: format, and what else stands there.
EDITS = {
    "patches": '"format": "int8"',
    "blocks.0": '"format": "mxfp8", "rotation": 16',
    "blocks.1": '"format": "int4_g32"',
    "blocks.2": '"format": "int8_token", "rotation": 32',
    "head": '"format": "fp8_channel"',
}
LAYER = "videomae.encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model("reference:penvideo20")


def planned(
    model: VideoModel, choices: dict[str, LayerChoice], evidence: dict[str, str] | None = None
) -> CompressionPlan:
    keep = LayerChoice(format="keep", reason="not in this test")
    return CompressionPlan(
        target="mixed",
        seed=0,
        model={"weights_sha256": model.weights_sha256},
        evidence=evidence or {},
        quantize={name: choices.get(name, keep) for name in model.layers},
    )


def calibrated(model: VideoModel, name: str, format: str, rotation: int) -> ModelTensors:
    """Tensors such as algorithms make, for one layer."""
    generator = torch.Generator().manual_seed(0)
    layer = model.layer(name)
    num_outputs, num_inputs = model.layers[name].weight_shape
    tensors = {
        "input_smoothing": torch.rand(num_inputs, generator=generator) + 0.5,
        "low_rank_down": torch.randn(4, num_inputs, generator=generator) / 50,
        "low_rank_up": torch.randn(num_outputs, 4, generator=generator) / 50,
        "bias": torch.randn(num_outputs, generator=generator),
    }
    frozen = freeze(layer, format, 4.0, rotation=rotation, tensors=tensors, name=name)
    assert isinstance(frozen, FrozenLinear)
    return {name: {**tensors, **frozen.stored_weight}}


def states(model: VideoModel, path: Path) -> dict[str, torch.Tensor]:
    plan, tensors = read_plan(path)
    return apply_plan(model, plan, tensors).module.state_dict()


def changes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not in both, or not equal."""
    return {
        name
        for name in before.keys() | after.keys()
        if name not in before
        or name not in after
        or not torch.equal(before[name].float(), after[name].float())
    }


def test_every_format_can_stand_in_a_plan(model: VideoModel, tmp_path: Path) -> None:
    linear = [
        name for name, facts in model.layers.items()
        if all(facts.objection(format) is None for format in FORMATS if "g128" not in format)
    ]  # fmt: skip
    names = [name for name in FORMATS if name != "int4_g128"]
    choices = {
        layer: LayerChoice(format=format, reason="", input_amax=4.0, rotation=16)
        for layer, format in zip(linear, names, strict=False)
    }
    assert len(choices) == len(names)
    save_plan(planned(model, choices), {}, tmp_path / "plan.json")
    result = apply_plan(model, *read_plan(tmp_path / "plan.json"))
    for layer, choice in choices.items():
        assert result.layer(layer).format == choice.format
    assert bool(result(model.example(1)).isfinite().all())


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_a_deleted_word_changes_exactly_that(
    model: VideoModel, tmp_path: Path, format: str
) -> None:
    tensors = calibrated(model, LAYER, format, 16)
    other = "videomae.encoder.layer.0.output.dense"
    choice = LayerChoice(
        format=format, reason="", input_amax=4.0, rotation=16, tensors=words(tensors[LAYER])
    )
    choices = {LAYER: choice, other: dataclasses.replace(choice, tensors=())}
    path = tmp_path / "plan.json"
    save_plan(planned(model, choices), tensors, path)
    before = states(model, path)
    text = path.read_text()
    assert '"tensors": ["input_smoothing", "low_rank", "bias", "weight"]' in text
    path.write_text(text.replace('"bias", "weight"', '"weight"'))
    after = states(model, path)
    assert changes(before, after) == {f"{LAYER}.bias"}
    path.write_text(text.replace(', "weight"]', "]"))
    # It is rounded anew, and was not changed since.
    assert changes(before, states(model, path)) == set()
    path.write_text(text.replace('"input_smoothing", "low_rank", "bias", "weight"', '"bias"'))
    changed = changes(before, states(model, path))
    assert {name.rpartition(".")[0] for name in changed} == {LAYER}
    edited = text.split("\n")
    (number,) = [n for n, line in enumerate(edited) if f'"{LAYER}"' in line]
    edited[number] = edited[number].replace(f'"{format}"', '"fp8"')
    path.write_text("\n".join(edited))
    with pytest.raises(InputError, match=rf"^{LAYER}\.weight: the stored weight .*delete the word"):
        states(model, path)


def test_words_without_tensors_are_all_listed(model: VideoModel) -> None:
    choice = LayerChoice(format="mxfp8", reason="", tensors=("low_rank", "weight"))
    with pytest.raises(InputError) as caught:
        apply_plan(model, planned(model, {LAYER: choice}))
    for word in choice.tensors:
        assert f"{LAYER}: the tensors file has no {word} for this layer" in str(caught.value)


class Tokens(nn.Module):
    """Convolved patches through three residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 64, (2, 8, 8), stride=(2, 8, 8))
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.patches(clips).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + functional.gelu(block(x))
        return self.head(x.mean(1))


def test_an_edited_plan_goes_all_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clips = np.random.default_rng(0).integers(0, 256, (24, 4, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "clips.npz", clips=clips)
    load = LoadOptions(input_spec="NCTHW:float32:1x3x4x16x16")
    model = wrap_module(Tokens(), name="tokens", options=load)
    options = vcompress.Options(
        target="int8", calib=str(tmp_path / "clips.npz"), output=tmp_path / "out", min_sqnr=10.0
    )
    path = tmp_path / "plan.json"
    write_plan(model, path, options=options)
    lines = path.read_text().splitlines()
    for name, edit in EDITS.items():
        (number,) = [n for n, line in enumerate(lines) if line.strip().startswith(f'"{name}":')]
        lines[number] = re.sub(r'"format": "\w+"', edit, lines[number])
    path.write_text("\n".join(lines))
    outcome = vcompress.apply(model, path, options=options)
    artifact = Artifact.open(outcome.path, verify_hashes=True)
    for role in ("onnx", "tensorrt-onnx"):
        file = artifact.file(role)
        assert file is not None
        found = read_precision(file, prefix="model.").formats
        assert found == {name: re.findall(r"\w+", edit)[1] for name, edit in EDITS.items()}
    stages = {stage["name"]: stage for stage in outcome.report["stages"]}
    assert stages["portable ONNX"]["parity"]["verdict"] in {"pass", "ties"}
    assert outcome.report["engines"][0]["status"] == "built", outcome.report["engines"]
