"""Which attentions run in eight bits: measured, refused where it hurts, and said so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.calib.clips import Clips
from vcompress.compress.attention_plan import calibrate_attention, decide_attention, formats_of
from vcompress.compress.attention_sites import apply_attention
from vcompress.compress.context import PlanContext
from vcompress.compress.latency_table import LatencyEntry, LatencyTable, find_operations
from vcompress.compress.losses import loss_of
from vcompress.models.video import VideoModel
from vcompress.spec.attention_section import AttentionChoice
from vcompress.spec.errors import InputError
from vcompress.spec.target import find_target

Wrap = Callable[..., VideoModel]
MakeClips = Callable[[VideoModel, int], Clips]
MakeContext = Callable[..., PlanContext]


class Attends(nn.Module):
    """One head over all places; `offset` is in every key."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        # Scores that differ, as those of trained models do.
        self.mix.weight.data *= 8
        self.register_buffer("offset", torch.full((8,), offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mix(x)
        return functional.scaled_dot_product_attention(y, y + self.offset, y)


class Attentions(nn.Module):
    """Three parts: an ordinary one, one with keys far from zero, one that no clip reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4))
        self.plain, self.far, self.never = Attends(0.0), Attends(300.0), Attends(0.0)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.patches(clips).flatten(2).transpose(1, 2)
        x = self.far(self.plain(x))
        if not math.isfinite(float(clips.abs().max())):
            x = self.never(x)
        return x.mean(1)


@pytest.fixture(scope="module")
def model(wrap: Wrap) -> VideoModel:
    return wrap(Attentions())


@pytest.fixture(scope="module")
def context(model: VideoModel, make_clips: MakeClips, make_context: MakeContext) -> PlanContext:
    made = make_context(model, make_clips(model, 12), target="fp8")
    return replace(made, max_layer_error=0.1)


def decided(
    model: VideoModel, context: PlanContext, **changes: object
) -> dict[str, AttentionChoice]:
    found = decide_attention(model, replace(context, **changes))  # type: ignore[arg-type]
    assert found is not None
    return found[0]


def test_nothing_is_decided_unless_it_is_asked_for(model: VideoModel, context: PlanContext) -> None:
    assert decide_attention(model, context) is None
    int4 = replace(context, target=find_target("int4"), attention="auto")
    assert decide_attention(model, int4) is None


def test_formats_are_those_of_the_target() -> None:
    assert formats_of("auto", find_target("int8")) == ("int8",)
    assert formats_of("int8", find_target("fp8")) == ("int8",)
    message = r"fp8 is nothing that .* int8 runs; .*: int8, int8_keep, auto, keep"
    with pytest.raises(InputError, match=message):
        formats_of("fp8", find_target("int8"))
    assert formats_of("int8_keep", find_target("int8")) == ("int8_keep",)


def test_ranges_are_those_of_all_clips(model: VideoModel, context: PlanContext) -> None:
    ranges = calibrate_attention(model, context.calibration)
    assert list(ranges) == ["plain", "far"]
    x = torch.from_numpy(next(context.calibration.batches(12)))
    with torch.inference_mode():
        module = model.module
        keys = module.plain.mix(module.patches(x).flatten(2).transpose(1, 2))
    assert ranges["plain"].query == pytest.approx(float(keys.abs().amax()))
    assert ranges["far"].key > 299
    assert ranges["far"].smooth_key < 0.2 * ranges["far"].key


def test_keys_are_smoothed_where_that_helps(model: VideoModel, context: PlanContext) -> None:
    lines = decided(model, context, attention="int8")
    assert list(lines) == ["plain", "far"]
    assert {line.format for line in lines.values()} == {"int8"}
    assert lines["far"].smooth_keys
    assert "of its own) within 10.00%" in lines["far"].reason
    changed = model.copy()
    apply_attention(changed.module, lines)
    x = context.clips
    assert isinstance(x, torch.Tensor)
    error = (changed(x) - model(x)).norm() / model(x).norm()
    assert 0 < float(error) < 0.1


def test_the_plan_with_the_smallest_loss_is_taken(model: VideoModel, context: PlanContext) -> None:
    def loss(lines: dict[str, AttentionChoice]) -> float:
        changed = model.copy()
        apply_attention(changed.module, lines)
        assert isinstance(context.clips, torch.Tensor)
        values = loss_of(model.task).values(model(context.clips), changed(context.clips))
        return float(values.mean())

    best = loss(decided(model, context, attention="auto"))
    for format_name in find_target("fp8").attention:
        assert best <= loss(decided(model, context, attention=format_name))


def test_it_is_refused_where_it_hurts(model: VideoModel, context: PlanContext) -> None:
    lines = decided(model, context, attention="fp8", max_layer_error=1e-6)
    assert {line.format for line in lines.values()} == {"keep"}
    assert all("fp8 would cause error" in line.reason for line in lines.values())


def test_values_that_are_not_finite_keep_an_attention(
    model: VideoModel, context: PlanContext
) -> None:
    broken = model.copy()
    broken.module.far.offset.fill_(math.inf)
    lines = decided(broken, context, attention="fp8")
    assert lines["plain"].format == "fp8"
    assert lines["far"].format == "keep"
    assert "not finite" in lines["far"].reason


def test_a_format_that_is_not_faster_is_not_taken(model: VideoModel, context: PlanContext) -> None:
    operations = find_operations(model)
    words = {word for calls in operations.values() for word in calls}
    (attention,) = {word for word in words if word.startswith("attention")}
    for seconds, expected in ((0.5, "int8"), (2.0, "keep")):
        entries = [LatencyEntry(operation=word, format="keep", seconds=1.0) for word in words]
        entries.append(LatencyEntry(operation=attention, format="int8", seconds=seconds))
        table = LatencyTable(
            source="measured", runtime="", device="", model_seconds=None, entries=tuple(entries)
        )
        lines = decided(model, context, attention="auto", latency=table)
        assert {line.format for line in lines.values()} == {expected}
    assert "no format has a time below that of float" in lines["plain"].reason
