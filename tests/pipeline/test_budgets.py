"""`--target mixed` from the command line to the artifact, and the plans that it makes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vcompress
from vcompress import cli
from vcompress.calib.clips import Clips
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.export.readback import read_precision
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, make_plan, read_plan, save_plan
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.plan import CompressionPlan

SOURCE = "reference:penvideo20"
FEW = ("--calib", SOURCE, "--num-clips", "16", "--quiet")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and error message of `vcompress ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["vcompress", *map(str, arguments)])
    code, message = cli._run()
    return code, message or ""


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(SOURCE)


@pytest.fixture(scope="module")
def calibration(model: VideoModel) -> Clips:
    request = ClipRequest(calib=SOURCE, data=None, num_clips=16, num_test_clips=8, seed=0)
    return open_clip_sets(request, model.clip, model.labels).calibration


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At most 5.2 bits, with the default algorithm."""
    options = vcompress.Options(
        target="mixed", calib=SOURCE, output=tmp_path_factory.mktemp("mixed") / "out",
        num_clips=16, num_test_clips=32, budget_bits=5.2, engine=False, max_drop=100,
    )  # fmt: skip
    return vcompress.quantize(SOURCE, options=options).path


def weight_bits(model: VideoModel, formats: dict[str, str], extras: int) -> float:
    """Effective bits of all layers; `formats` as they were read back."""
    bits, count = extras, 0
    for name, facts in model.layers.items():
        size = math.prod(facts.weight_shape)
        count += size
        bits += (
            32 * size if formats[name] == "float"
            else FORMATS[formats[name]].weight_bits(facts.weight_shape)
        )  # fmt: skip
    return bits / count


def test_the_budget_in_bits_holds_in_the_artifact(model: VideoModel, artifact: Path) -> None:
    opened = Artifact.open(artifact, verify_hashes=True)
    plan, tensors = read_plan(artifact / "plan.json")
    extras = sum(
        8 * tensor.numel() * tensor.element_size()
        for name, parts in tensors.items()
        for part, tensor in parts.items()
        if not part.startswith("weight_")
        # A corrected bias takes the place of the old one, where there is one.
        and (part != "bias" or model.layer(name).bias is None)
    )
    for role in ("onnx", "tensorrt-onnx"):
        file = opened.file(role)
        assert file is not None
        found = read_precision(file, prefix="model.").formats
        assert weight_bits(model, found, extras) <= 5.2
    search = plan.evidence["search"]
    assert search["budget"] == {"kind": "effective_bits", "limit": 5.2}
    assert search["effective_bits"] == pytest.approx(weight_bits(model, found, extras), abs=1e-3)
    assert search["effective_bits"] > 4.8
    assert len({choice.format for choice in plan.quantize.values()}) > 1
    assert all(choice.reason for choice in plan.quantize.values())
    blocks = {name.rpartition(".attention.attention.")[0] for name in plan.quantize}
    for block in blocks - {""}:
        shared = {
            choice.format
            for name, choice in plan.quantize.items()
            if name.startswith(f"{block}.attention.attention.")
        }
        assert len(shared) == 1


def test_the_onnx_of_an_auto_plan_matches_and_the_artifact_validates(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    parity = stages["portable ONNX"]["parity"]
    assert parity["verdict"] in {"pass", "ties"}
    # Ties are replayed; how far they spread depends on the number of threads.
    assert parity["relative_l2_max"] <= 0.1
    assert stages["portable ONNX"]["metrics_versus_previous"]["agreement_percent"] >= 98.4
    plan, tensors = read_plan(artifact / "plan.json")
    assert plan.evidence["algorithm"] == "auto"
    assert tensors
    assert run(monkeypatch, "validate", artifact, "--quiet", "--max-drop", 100) == (0, "")


def test_an_edited_line_changes_exactly_that_layer(
    model: VideoModel, artifact: Path, tmp_path: Path
) -> None:
    plan, tensors = read_plan(artifact / "plan.json")
    before = apply_plan(model, plan, tensors).module.state_dict()
    name = next(name for name, choice in plan.quantize.items() if "weight" in choice.tensors)
    path = tmp_path / "plan.json"
    save_plan(plan, tensors, path)
    lines = path.read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines) if f'"{name}":' in line]
    changed_line = lines[number].replace(', "weight"]', "]").replace('["weight"]', "[]")
    assert changed_line != lines[number]
    lines[number] = changed_line
    path.write_text("\n".join(lines))
    after = apply_plan(model, *read_plan(path)).module.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    assert changed
    assert {key.rpartition(".")[0] for key in changed} == {name}


def test_the_budget_in_bytes_holds(model: VideoModel, calibration: Clips) -> None:
    from vcompress.pipeline.record import _planned_bits

    floats = sum(4 * parameter.numel() for parameter in model.module.parameters())
    limit = int(0.2 * floats)
    options = vcompress.Options(target="mixed", calib=SOURCE, max_size=limit)
    plan, tensors = make_plan(model, calibration, options)
    size = _planned_bits(apply_plan(model, plan, tensors)) / 8
    assert 0.9 * limit < size <= limit


def test_a_bar_is_searched_for(model: VideoModel, calibration: Clips) -> None:
    bits = []
    for limits in ({"min_sqnr": 25.0}, {}):
        options = vcompress.Options(target="mixed", calib=SOURCE, algorithm="max", **limits)
        plan, _ = make_plan(model, calibration[:8], options)
        search = plan.evidence["search"]
        bits.append(search["effective_bits"])
        if "min_sqnr" in limits:
            batch = torch.from_numpy(next(calibration.batches(8)))
            expected = model(batch)
            error = (apply_plan(model, plan)(batch) - expected).square().sum()
            assert 10 * math.log10(expected.square().sum() / error) >= limits["min_sqnr"]
    assert all(4.5 < each < 31 for each in bits)
    # No limit, a classifier: one point of top-1.
    assert search["budget"] == {"kind": "drop_points", "limit": 1.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "int8", "--budget-bits", "5"], "are for --target mixed"),
        (["--target", "nvfp4", "--max-size", "2MB"], "are for --target mixed"),
        (["--target", "mixed", "--budget-bits", "5", "--max-size", "2MB"], "are budgets; give one"),
        (["--target", "mixed", "--budget-bits", "0.5"], "--budget-bits must lie between 1 and 64"),
        (["--target", "mixed", "--budget-bits", "nan"], "--budget-bits must lie between 1 and 64"),
        (["--target", "mixed", "--budget-bits", "2"], "--budget-bits must be at least 4."),
        (["--target", "mixed", "--max-size", "1kB"], "--max-size must be at least"),
        (["--target", "mixed", "--max-size", "1e3"], "not a size such as 12MB"),
        (["--target", "mixed", "--max-size", "9" * 400], "not a size such as 12MB"),
        (["--target", "mixed", "--max-size", "0MB"], "--max-size must lie between 1"),
        (["--target", "mixed", "--budget-bits", "5", "--algorithm", "gptg"], "unknown algorithm"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_budgets_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, message = run(monkeypatch, "plan", SOURCE, *FEW, *arguments)
    assert code == 2
    assert expected in message + capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_need_a_limit() -> None:
    options = vcompress.Options(target="mixed", calib=SOURCE)
    with pytest.raises(
        InputError, match="needs a limit: add --budget-bits, --max-size, --max-latency or --min"
    ):
        options.budget("restore")
    assert vcompress.Options(target="mixed", min_sqnr=20).budget("restore") is not None
    assert vcompress.Options(target="nvfp4").budget("restore") is None


def test_a_plan_of_a_search_is_stable(model: VideoModel, calibration: Clips) -> None:
    options = vcompress.Options(target="mixed", calib=SOURCE, budget_bits=6.0, algorithm="max")
    first, second = (make_plan(model, calibration, options)[0] for _ in range(2))
    assert isinstance(first, CompressionPlan)
    assert first.to_json() == second.to_json()


def test_a_bar_that_nothing_is_measured_by_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bar for generated clips"):
        vcompress.Options(target="int8", calib=SOURCE, min_psnr=30.0)
    # A search of formats takes it for single calls of a denoiser; here there is none.
    options = vcompress.Options(
        target="mixed", calib=SOURCE, min_psnr=30.0, output=tmp_path / "out"
    )
    with pytest.raises(InputError, match="task of penvideo20 is classify"):
        vcompress.quantize(SOURCE, options=options)
    options = vcompress.Options(
        target="int8", calib=SOURCE, prompts=tmp_path / "p.txt", output=tmp_path / "out"
    )
    with pytest.raises(InputError, match="--prompts are what"):
        vcompress.quantize("reference:moving-fashion", options=options)
