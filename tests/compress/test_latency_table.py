"""Plans under a budget of time, with tables written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.compress.context import PlanContext
from vcompress.compress.latency_table import (
    LatencyEntry,
    LatencyTable,
    ModelTimes,
    find_operations,
    operation_sizes,
)
from vcompress.compress.mixed import MixedFormats, find_formats
from vcompress.compress.roofline import RTX_5090, estimate
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError

Wrap = Callable[..., VideoModel]
MakeClips = Callable[[VideoModel, int], Clips]
MakeContext = Callable[..., PlanContext]

WIDE, NARROW, CONVOLUTION = (
    "linear:8x16x32", "linear:8x32x16", "conv3d:1x3x4x8x8*16x3x2x4x4/2x4x4/0x0x0/1x1x1/1",
)  # fmt: skip


class Layers(nn.Module):
    """A convolution and two linears of different shapes, the second called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4))
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.patches(clips).flatten(2).transpose(1, 2)
        x = self.narrow(torch.relu(self.wide(x)))
        return self.wide(x).mean(1)


@pytest.fixture(scope="module")
def model(wrap: Wrap) -> VideoModel:
    return wrap(Layers())


@pytest.fixture(scope="module")
def context(model: VideoModel, make_clips: MakeClips, make_context: MakeContext) -> PlanContext:
    return make_context(model, make_clips(model, 16))


def table(*entries: tuple[str, str, float], model_seconds: float | None = None) -> LatencyTable:
    return LatencyTable(
        source="measured", runtime="by hand", device="paper", model_seconds=model_seconds,
        entries=tuple(
            LatencyEntry(operation=operation, format=format_name, seconds=seconds)
            for operation, format_name, seconds in entries
        ),
    )  # fmt: skip


# In float 1 + 2 * 4 + 3 = 12 s of 16 s.
FLOAT_TIMES = ((CONVOLUTION, "keep", 1.0), (WIDE, "keep", 4.0), (NARROW, "keep", 3.0))


def found(
    context: PlanContext, model: VideoModel, limit: float, made: LatencyTable
) -> MixedFormats:
    budget = Budget("latency_share", limit)
    return find_formats(model, replace(context, budget=budget, latency=made))


def test_operations_are_layers_with_their_sizes(model: VideoModel) -> None:
    assert find_operations(model) == {
        "patches": (CONVOLUTION,), "wide": (WIDE, WIDE), "narrow": (NARROW,),
    }  # fmt: skip
    assert operation_sizes(WIDE) == ("linear", ((8, 16, 32),))
    assert operation_sizes(CONVOLUTION) == ("conv3d", ((1, 3, 4, 8, 8), (16, 3, 2, 4, 4)))


def test_attention_is_an_operation_too(transformer: VideoModel) -> None:
    assert find_operations(transformer)["blocks.0"] == ("attention:1x8x8x32x32",)


def test_times_of_all_calls_count(model: VideoModel) -> None:
    made = table(*FLOAT_TIMES, (WIDE, "int8", 1.5), model_seconds=16.0)
    times = ModelTimes(made, find_operations(model))
    assert times.model_seconds == 16.0
    assert times.of("wide", "int8") == 3.0
    assert times.of("narrow", "int8") is None
    assert times.together({"wide": "int8", "narrow": "keep"}) == 6.0
    assert times.rest(["wide", "narrow"]) == 5.0


def test_the_plan_is_that_of_the_table(model: VideoModel, context: PlanContext) -> None:
    """Within 11 of 16 s: of 12 s in layers 5 s must be saved, which `wide` alone brings."""
    made = table(*FLOAT_TIMES, (WIDE, "int8", 1.5), (NARROW, "int8", 2.5), model_seconds=16.0)
    plan = found(context, model, 11 / 16, made)
    assert plan.formats == {"patches": "keep", "wide": "int8", "narrow": "keep"}
    assert plan.evidence["latency_share_by_table"] == round(11 / 16, 4)
    assert plan.evidence["latency_table"] == made.as_dict()
    both = found(context, model, 10.5 / 16, made)
    assert both.formats == {"patches": "keep", "wide": "int8", "narrow": "int8"}
    free = found(context, model, 1.0, made)
    assert set(free.formats.values()) == {"keep"}


def test_a_format_without_a_time_is_no_option(model: VideoModel, context: PlanContext) -> None:
    made = table(*FLOAT_TIMES, (WIDE, "int8", 1.5), (NARROW, "fp8", 0.5))
    plan = found(context, model, 0.5, made)
    assert plan.formats == {"patches": "keep", "wide": "int8", "narrow": "fp8"}


def test_a_slower_format_is_not_taken(model: VideoModel, context: PlanContext) -> None:
    made = table(*FLOAT_TIMES, (WIDE, "int8", 5.0), (NARROW, "int8", 1.0))
    assert found(context, model, 0.84, made).formats["wide"] == "keep"


def test_a_budget_that_cannot_be_met_names_the_least(
    model: VideoModel, context: PlanContext
) -> None:
    made = table(*FLOAT_TIMES, (WIDE, "int8", 1.5), model_seconds=16.0)
    # 4 s outside, 1 + 3 + 3 s inside.
    with pytest.raises(InputError, match=r"at least 0.688 .*, got 0.5; 25.0% of the time"):
        found(context, model, 0.5, made)


def test_a_table_of_another_model_is_refused(model: VideoModel) -> None:
    made = table((WIDE, "keep", 1.0))
    with pytest.raises(InputError, match=r"no time in keep for .* and linear|for conv3d"):
        ModelTimes(made, find_operations(model))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    made = table(*FLOAT_TIMES, model_seconds=16.0)
    made.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1"),
        ({"source": "guessed"}, "source one of measured, estimate"),
        ({"device": 3}, "device must be a string"),
        ({"model_seconds": 0}, "model_seconds must be a number"),
        ({"entries": {}}, "entries must be a list"),
        ({"entries": [{"operation": "a", "format": "int9", "seconds": 1}]}, "did you mean 'int8'"),
        ({"entries": [{"operation": "a", "format": "int8", "seconds": -1}]}, r"\[0\]: seconds"),
        ({"entries": [{"operation": "a", "format": "int8"}]}, "missing key 'seconds'"),
        ({"entries": [{"operation": "a", "format": "int8", "seconds": 1}] * 2}, "two entries"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(change: dict[str, Any], message: str) -> None:
    data = json.loads(json.dumps(table(*FLOAT_TIMES).as_dict())) | change
    with pytest.raises(InputError, match=message):
        LatencyTable.from_dict(data)


def test_the_roofline_by_hand() -> None:
    large, small = "linear:4096x4096x4096", "linear:1x4096x4096"
    made = estimate([large, small, large, "attention:1x64x64x32x32"], ("int8", "nvfp4"))
    assert made.source == "estimate"
    seconds = made.seconds
    operations = 2 * 4096**3
    # Many rows are bound by multiplications, one row by the bytes of the weight.
    assert seconds[large, "int8"] == pytest.approx(operations / 838e12)
    assert seconds[large, "keep"] == pytest.approx(operations / 104.8e12)
    weight_bits = 4096 * 4096 * 8 + 4096 * 32
    moved = (weight_bits + 8 * 4096 + 32 * 4096) / 8
    assert seconds[small, "int8"] == pytest.approx(moved / RTX_5090.bytes_per_second)
    assert ("attention:1x64x64x32x32", "nvfp4") not in seconds
    # A format of two products is one of attention alone.
    both = estimate([large, "attention:1x64x64x32x32"], ("int8", "int8_fp8")).seconds
    assert (large, "int8_fp8") not in both
    assert ("attention:1x64x64x32x32", "int8_fp8") in both
    convolution = estimate([CONVOLUTION], ("int8", "nvfp4"))
    assert convolution.formats == ("keep", "int8")
