"""The whole chain on real models: plan, edit, apply, prove."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vcompress
from vcompress.calib.clips import Clips
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.compress.frozen import FrozenLayer
from vcompress.models.load import LoadOptions, load_model, wrap_module
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, make_plan, read_plan, save_plan
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import BuildError, InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan

SOURCE = "reference:penvideo20"


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(SOURCE)


@pytest.fixture(scope="module")
def calibration(model: VideoModel) -> Clips:
    request = ClipRequest(calib=SOURCE, data=None, num_clips=16, num_test_clips=8, seed=0)
    return open_clip_sets(request, model.clip, model.labels).calibration


@pytest.fixture(scope="module")
def plan(model: VideoModel, calibration: Clips) -> CompressionPlan:
    options = vcompress.Options(target="nvfp4", calib=SOURCE, algorithm="max")
    return make_plan(model, calibration, options)[0]


def formats(model: VideoModel) -> dict[str, str]:
    return {
        name: module.format
        for name, module in model.module.named_modules()
        if isinstance(module, FrozenLayer)
    }


def test_every_layer_stands_in_the_plan_with_a_reason(
    model: VideoModel, plan: CompressionPlan
) -> None:
    assert list(plan.quantize) == list(model.layers)
    assert all(choice.reason for choice in plan.quantize.values())
    patch = plan.quantize["videomae.embeddings.patch_embeddings.projection"]
    assert patch.format == "int8"
    assert "not conv3d" in patch.reason
    assert "nvfp4" in {choice.format for choice in plan.quantize.values()}


def test_applying_the_file_equals_applying_the_plan(
    model: VideoModel, plan: CompressionPlan, tmp_path: Path
) -> None:
    save_plan(plan, {}, tmp_path / "plan.json")
    loaded, _ = read_plan(tmp_path / "plan.json")
    clips = model.example(2)
    first, second = apply_plan(model, loaded), apply_plan(model, loaded)
    assert torch.equal(first(clips), second(clips))
    assert formats(first) == {
        name: choice.format for name, choice in plan.quantize.items() if choice.format != "keep"
    }


def test_editing_one_line_changes_exactly_that_layer(
    model: VideoModel, plan: CompressionPlan, tmp_path: Path
) -> None:
    edited_layer = "videomae.encoder.layer.2.intermediate.dense"
    path = tmp_path / "plan.json"
    save_plan(plan, {}, path)
    lines = path.read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines) if f'"{edited_layer}"' in line]
    assert '"format": "nvfp4"' in lines[number]
    lines[number] = lines[number].replace('"format": "nvfp4"', '"format": "fp8"')
    path.write_text("\n".join(lines))
    before = apply_plan(model, read_plan_of(plan, tmp_path)).module.state_dict()
    after_model = apply_plan(model, read_plan(path)[0])
    after = after_model.module.state_dict()
    assert formats(after_model)[edited_layer] == "fp8"
    for name in before.keys() | after.keys():
        if not name.startswith(f"{edited_layer}."):
            assert torch.equal(before[name].float(), after[name].float()), name


def read_plan_of(plan: CompressionPlan, folder: Path) -> CompressionPlan:
    """`plan` with its floats as the file rounds them."""
    save_plan(plan, {}, folder / "unedited.json")
    return read_plan(folder / "unedited.json")[0]


def test_a_wrong_name_names_the_nearest(model: VideoModel, plan: CompressionPlan) -> None:
    choices = dict(plan.quantize)
    choices["clasifier"] = choices.pop("classifier")
    with pytest.raises(InputError, match="clasifier: no such layer; did you mean 'classifier'"):
        apply_plan(model, dataclasses.replace(plan, quantize=choices))


def test_tokens_and_precision_work_together(model: VideoModel, calibration: Clips) -> None:
    options = vcompress.Options(target="int8", calib=SOURCE, tokens=0.8)
    merged, _ = make_plan(model, calibration, options)
    assert merged.tokens is not None
    assert all(site.keep < merged.tokens.num_patches for site in merged.tokens.sites.values())
    assert merged.tokens.sites
    planned = apply_plan(model, merged)
    batch = torch.from_numpy(next(calibration.batches(16)))
    agreement = (planned(batch).argmax(-1) == model(batch).argmax(-1)).float().mean()
    assert agreement > 0.8


def test_smoothing_is_stored_beside_the_plan(
    model: VideoModel, calibration: Clips, tmp_path: Path
) -> None:
    options = vcompress.Options(target="nvfp4", calib=SOURCE, algorithm="awq")
    smooth, tensors = make_plan(model, calibration, options)
    saved = save_plan(smooth, tensors, tmp_path / "plan.json")
    assert saved.tensors is not None
    loaded, loaded_tensors = read_plan(tmp_path / "plan.json")
    named = {name for name, choice in loaded.quantize.items() if choice.tensors}
    assert named
    assert named <= set(loaded_tensors)
    assert {choice.tensors for choice in loaded.quantize.values()} <= {(), ("input_smoothing",)}
    batch = torch.from_numpy(next(calibration.batches(16)))
    expected = model(batch)
    error = torch.linalg.vector_norm(apply_plan(model, loaded, loaded_tensors)(batch) - expected)
    assert error / torch.linalg.vector_norm(expected) < 0.1
    (tmp_path / "plan.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="was changed since"):
        read_plan(tmp_path / "plan.json")


def test_modelopt_sees_the_ranges_that_we_see(model: VideoModel, calibration: Clips) -> None:
    from vcompress.calib.observe import observe
    from vcompress.compress.modelopt_bridge import calibrate

    layers = {name: model.layer(name) for name in model.layers}
    ours = observe(model, layers, calibration, needs=frozenset({"input_amax"}))
    bridged = calibrate(
        model,
        dict.fromkeys(model.layers, "int8"),
        "modelopt-max",
        lambda subject: [subject(torch.from_numpy(b)) for b in calibration.batches(8)] and None,
    )
    assert bridged.input_amax == pytest.approx(ours.input_amax, rel=1e-6)
    assert bridged.smoothing == {}


@pytest.mark.parametrize("target", ["nvfp4", "int8", "fp8"])
def test_the_artifact_is_complete_and_proven(tmp_path: Path, target: str) -> None:
    outcome = vcompress.quantize(
        SOURCE,
        options=vcompress.Options(
            target=target, calib=SOURCE, output=tmp_path / "out", num_clips=32, num_test_clips=64
        ),
    )
    artifact = Artifact.open(outcome.path, verify_hashes=True)
    roles = {entry["role"] for entry in artifact.manifest["files"]}
    assert roles == {
        "plan", "onnx", "tensorrt-onnx", "engine", "golden", "proof", "labels", "report",
        "report-page", *(["plan-tensors"] if target == "nvfp4" else []),
    }  # fmt: skip
    stages = {stage["name"]: stage for stage in outcome.report["stages"]}
    assert stages["baseline ONNX"]["parity"]["relative_l2_max"] <= 1e-5
    assert stages["portable ONNX"]["parity"]["relative_l2_max"] <= 1e-2
    assert stages["portable ONNX"]["parity"]["verdict"] in {"pass", "ties"}
    assert stages["portable ONNX"]["metrics_versus_previous"]["agreement_percent"] >= 98.4
    assert outcome.report["engines"][0]["status"] == "built"
    assert outcome.report["precision"]["result_effective_bits"] < (7 if target == "nvfp4" else 11)
    assert (stages["portable ONNX"]["latency"] is None) == (target != "int8")


class Research(nn.Module):
    """Somebody's own network, with convolutions only in part of a width that NVFP4 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 12, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(12, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU())
            for _ in range(2)
        )
        self.wide = nn.Linear(12, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.stem(clips)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.relu(self.wide(x.mean((2, 3, 4)))))


def test_any_module_goes_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clips = np.random.default_rng(0).integers(0, 256, (24, 4, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "clips.npz", clips=clips)
    model = wrap_module(
        Research(), name="research",
        options=LoadOptions(input_spec="NCTHW:float32:1x3x4x16x16"),
    )  # fmt: skip
    outcome = vcompress.quantize(
        model,
        options=vcompress.Options(
            target="nvfp4", calib=str(tmp_path / "clips.npz"), output=tmp_path / "out"
        ),
    )
    chosen = {name: choice.format for name, choice in outcome.plan.quantize.items()}
    assert chosen["stem"] == "int8"
    assert chosen["wide"] == "int8"  # 12 inputs: no block of 16
    assert "divisible by 16, got 12" in outcome.plan.quantize["wide"].reason
    assert outcome.report["engines"][0]["status"] == "built", outcome.report["engines"]
    json.loads((outcome.path / "plan.json").read_text())


def test_another_answer_than_the_module_must_be_a_tie(
    model: VideoModel, plan: CompressionPlan, calibration: Clips, tmp_path: Path
) -> None:
    from vcompress.export.graph import export_onnx
    from vcompress.models.video import PrimaryOutput
    from vcompress.pipeline.equivalence import agreement_of

    planned = apply_plan(model, plan)
    path = tmp_path / "model.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    logits = np.eye(20)[[0] * len(calibration)]
    other = logits.copy()
    other[5] = np.eye(20)[1]
    # The file computes what the module does: whatever differed before, nothing is left of it.
    found = agreement_of(planned, path, calibration, logits, other)
    assert found is not None
    assert (found.verdict, found.num_tied) == ("ties", 1)
    # A file of another plan names other classes, and no tie explains it.
    floats = {name: dataclasses.replace(each, format=FLOAT) for name, each in plan.quantize.items()}
    wrong = dataclasses.replace(plan, quantize={**floats, **dict(list(plan.quantize.items())[:3])})
    with pytest.raises(BuildError, match="rounding ties explain 0"):
        agreement_of(apply_plan(model, wrong), path, calibration, logits, other)
