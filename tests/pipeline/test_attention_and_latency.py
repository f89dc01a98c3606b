"""`--attention`, `--max-latency` and `vcompress latency` as a user meets them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import vcompress
from vcompress import cli
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.compress.attention_sites import products_of
from vcompress.compress.latency_table import LatencyTable, find_operations
from vcompress.export.readback import read_precision
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.video import VideoModel
from vcompress.pipeline import timing
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.pipeline.run import Options, Silent
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.metrics import sqnr_db


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.join = nn.LayerNorm(32), nn.Linear(32, 96)
        self.out, self.grow, self.shrink = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.join(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.shrink(functional.gelu(self.grow(x)))


class Small(nn.Module):
    """Clips `[B, 3, 4, 16, 16]` to ten numbers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(32, 10)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.patches(clips).flatten(2).transpose(1, 2))
        return self.head(x.mean(1))


class Attends(nn.Module):
    """The same with a convolution, an attention and a linear for tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4)), nn.Linear(32, 10)
        self.attention = Attention()

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(self.patches(clips).flatten(2).transpose(1, 2))).mean(1)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def wrapped(module: nn.Module) -> VideoModel:
    load = LoadOptions(input_spec="NCTHW:float32:1x3x4x16x16")
    return wrap_module(module, name="small", options=load)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return wrapped(Small(2))


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clips.npz"
    clips = np.random.default_rng(0).normal(size=(24, 3, 4, 16, 16)).astype("f4")
    np.savez(path, clips=clips)
    return str(path)


def made(model: VideoModel, calib: str, **options: object) -> CompressionPlan:
    request = ClipRequest(calib=calib, data=None, num_clips=16, num_test_clips=8, seed=0)
    clips = open_clip_sets(request, model.clip, model.labels).calibration
    wanted = Options(calib=calib, algorithm="max", max_layer_error=1.0, **options)  # type: ignore[arg-type]
    return make_plan(model, clips, wanted)[0]


def test_a_plan_with_attention_is_executed_line_by_line(model: VideoModel, calib: str) -> None:
    plan = made(model, calib, target="int8", attention="auto")
    assert plan.attention is not None
    assert list(plan.attention) == ["blocks.0", "blocks.1"]
    assert plan.evidence["attention"] == {
        "products": {"int8": 4}, "bits_per_operand_value": 8.0,
    }  # fmt: skip
    kept = replace(plan.attention["blocks.0"], format="keep")
    edited = replace(plan, attention={**plan.attention, "blocks.0": kept})
    edited = CompressionPlan.from_dict(json.loads(edited.to_json()))
    assert list(products_of(apply_plan(model, plan).module)) == ["blocks.0", "blocks.1"]
    assert list(products_of(apply_plan(model, edited).module)) == ["blocks.1"]
    wrong = replace(plan, attention={"blocks.2": kept})
    with pytest.raises(InputError, match=r"attention.blocks.2: no such attention; did you mean"):
        apply_plan(model, wrong)


def test_the_artifact_holds_what_was_planned(calib: str, tmp_path: Path) -> None:
    model = wrapped(Small(1))
    options = Options(
        target="int8", attention="int8", calib=calib, output=tmp_path / "out", engine=False,
        num_clips=16, num_test_clips=8, max_layer_error=1.0, min_sqnr=20.0,
    )  # fmt: skip
    outcome = vcompress.quantize(model, options=options)
    assert outcome.verdict.outcome == "pass"
    for name in ("model.onnx", "model.tensorrt.onnx"):
        formats = [each.format for each in read_precision(outcome.path / name).products]
        assert formats == ["int8"] * 2
    rows = {row["name"]: row for row in outcome.report["layers"]}
    assert rows["blocks.0 (QK, PV)"]["format"] == "int8"
    page = (outcome.path / "report.html").read_text(encoding="utf-8")
    assert "blocks.0 (QK, PV)" in page.replace("<wbr>", "")
    plan = CompressionPlan.load(outcome.path / "plan.json")
    clips = torch.from_numpy(np.load(outcome.path / "golden.npz")["inputs"])
    outputs = torch.from_numpy(np.load(outcome.path / "golden.npz")["outputs"])
    assert plan.attention is not None
    # One tie in so small a network is at 53 dB.
    assert sqnr_db(apply_plan(model, plan)(clips), outputs) > 45


def test_formats_that_run_here_are_measured_and_others_are_not(
    calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(Attends())
    monkeypatch.setattr(timing, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_ROUNDS", 1)
    path = tmp_path / "table.json"
    table = timing.measure_latency(model, path, formats=("nvfp4", "int8"))
    assert LatencyTable.load(path).as_dict() == table.as_dict()
    assert table.source == "measured"
    assert table.formats == ("keep", "int8")
    words = {word for calls in find_operations(model).values() for word in calls}
    assert {each.operation for each in table.entries if each.format == "keep"} == words
    integer = {each.operation for each in table.entries if each.format == "int8"}
    # ONNX Runtime fuses no convolution whose output stays in float.
    assert integer == {"linear:32x32x10", "attention:1x32x32x32x32"}
    plan = made(
        model, calib, target="mixed", max_latency=1.0, latency_table=str(path), attention="keep"
    )
    assert {line.format for line in plan.quantize.values()} <= {"keep", "int8"}
    assert plan.evidence["search"]["latency_table"] == table.as_dict()
    with pytest.raises(InputError, match="add --force"):
        timing.measure_latency(model, path)
    with pytest.raises(InputError, match="did you mean 'int8'"):
        timing.measure_latency(model, tmp_path / "new.json", formats=("int9",))


def test_attention_saves_time_for_layers(model: VideoModel, calib: str, tmp_path: Path) -> None:
    """Of 12 s in 12 operations 4 s are to be saved; two attentions in INT8 save 1.5 s of them."""
    operations = find_operations(model)
    words = sorted({word for calls in operations.values() for word in calls})
    entries = [
        {"operation": word, "format": name, "seconds": seconds}
        for word in words
        for name, seconds in (("keep", 1.0), ("int8", 0.25 if "attention" in word else 0.5))
        if name == "keep" or not word.startswith("conv")
    ]
    data = {
        "schema": 1, "source": "measured", "runtime": "by hand", "device": "paper",
        "model_seconds": None, "entries": entries,
    }  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    numbers = {}
    for attention in ("keep", "auto"):
        plan = made(
            model, calib, target="mixed", max_latency=8.0 / 12, latency_table=str(path),
            attention=attention,
        )  # fmt: skip
        numbers[attention] = [line.format for line in plan.quantize.values()].count("int8")
        assert plan.evidence["search"]["latency_share_by_table"] == round(8.0 / 12, 4)
    # Every layer in INT8 saves half a second.
    assert numbers == {"keep": 8, "auto": 5}


def test_an_estimate_says_so(model: VideoModel, calib: str) -> None:
    warnings: list[str] = []

    class Watched(Silent):
        def warn(self, text: str) -> None:
            warnings.append(text)

    formats = ("nvfp4", "int8", "keep")
    table = timing.table_for(model, model, formats, timing.ROOFLINE, Watched())
    assert table.source == "estimate"
    assert warnings == [
        "times are an estimate (roofline of the data sheet, NVIDIA GeForce RTX 5090 (SM120)), not "
        "measured: they rank formats and predict no latency"
    ]
    assert set(table.formats) == set(formats)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "int8", "--attention", "fp8"), "--attention fp8 is nothing that hardware"),
        (("--target", "int8", "--max-latency", "0.5"), "are for --target mixed"),
        (("--target", "mixed", "--latency-table", "roofline"), "add --max-latency"),
        (
            ("--target", "mixed", "--max-latency", "0.5", "--budget-bits", "5"),
            "--budget-bits, --max-size and --max-latency are budgets; give one",
        ),
    ],
)
def test_wrong_usage_is_explained(
    monkeypatch: pytest.MonkeyPatch, calib: str, arguments: tuple[str, ...], message: str
) -> None:
    command = ["vcompress", "plan", "reference:penvideo20", "--calib", calib, "-q", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    code, said = cli._run()
    assert code == 2
    assert said is not None
    assert message in said


def test_kernels_are_measured_and_a_slower_format_is_not_chosen(
    model: VideoModel, calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's interpreter takes minutes for this.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "table.json"
    formats = ("nvfp4", "int8_token", "int8")
    table = timing.measure_latency(model, path, formats=formats, device="cpu")
    assert "kernels of vcompress" in table.runtime
    by_format = {
        name: {each.operation.partition(":")[0] for each in table.entries if each.format == name}
        for name in table.formats
    }
    linears = {name: {"linear"} for name in formats}
    assert by_format == {"keep": {"conv3d", "linear"}, **linears}
    # Written by hand: four bits take twice as long as float, eight bits half as long.
    times = {"keep": 1.0, "nvfp4": 2.0, "int8_token": 1.0, "int8": 0.5}
    data = table.as_dict()
    data["model_seconds"] = None
    for entry in data["entries"]:
        entry["seconds"] = times[entry["format"]]
    path.write_text(json.dumps(data), encoding="utf-8")
    plan = made(model, calib, target="mixed", max_latency=0.7, latency_table=str(path))
    assert {line.format for line in plan.quantize.values()} == {"keep", "int8"}
    said = plan.quantize["blocks.0.grow"].reason
    assert "nvfp4 takes 2.00 times as long" in said
    assert "int8 takes" not in said


def test_a_device_that_is_not_there(model: VideoModel, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(MissingCapabilityError, match="leave it out"):
            timing.measure_latency(model, tmp_path / "t.json", device="cuda")
