"""The search for formats under a budget, on networks that are hostile to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.compress.choice_loss import comparison_of, measure_choice
from vcompress.compress.clip_choice import batches_of
from vcompress.compress.context import PlanContext
from vcompress.compress.mixed import find_formats
from vcompress.compress.precision_search import PrecisionSearch
from vcompress.compress.sensitivities import freeze_candidates, predict_sensitivities
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS as SPECS

Wrap = Callable[..., VideoModel]
MakeClips = Callable[..., Clips]
MakeContext = Callable[..., PlanContext]
FORMATS = ("nvfp4", "mxfp8", "fp8", "int8")


def search_of(
    model: VideoModel, clips: Clips, amax: dict[str, float], formats: tuple[str, ...] = FORMATS
) -> PrecisionSearch:
    candidates = freeze_candidates(model, formats, amax)
    found = predict_sensitivities(model, candidates, clips, num_clips=16, num_probes=4, seed=0)
    return PrecisionSearch(model, candidates, found)


def test_clips_of_all_classes_are_taken(transformer: VideoModel, make_clips: MakeClips) -> None:
    clips = make_clips(transformer, 20)
    batches = batches_of(clips, 10)
    assert [len(batch) for batch in batches] == [8, 2]
    taken = torch.cat(batches).numpy()
    assert np.array_equal(taken, clips.data[::2])
    assert sum(map(len, batches_of(clips, 99))) == 20
    assert sum(map(len, batches_of(clips, 15))) == 15


def test_layers_that_share_an_input_share_a_format(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips = make_clips(transformer, 16)
    context = make_context(transformer, clips)
    search = search_of(transformer, clips, context.stats.input_amax)
    groups = {group.layers for group in search.groups}
    assert ("blocks.0.query", "blocks.0.key", "blocks.0.value") in groups
    assert ("blocks.1.wide",) in groups
    comparison = comparison_of(transformer, clips, 16)
    previous = np.inf
    for bits in (5.1, 6.0, 8.0, 16.0, 40.0):
        found = search.choose(bits * search.num_weights, comparison)
        assert found.bits <= bits * search.num_weights
        for block in ("blocks.0", "blocks.1"):
            assert len({found.formats[f"{block}.{n}"] for n in ("query", "key", "value")}) == 1
        # Not bound to fall, but more bits never cost much more.
        assert found.measured_loss < 2 * previous + 1e-12
        previous = found.measured_loss
    assert set(found.formats.values()) == {"keep"}
    assert found.measured_loss == 0


def test_the_plan_beats_plans_of_the_same_size(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips, others = make_clips(transformer, 32), make_clips(transformer, 32, seed=1)
    context = make_context(transformer, clips)
    search = search_of(transformer, clips, context.stats.input_amax)
    candidates = freeze_candidates(transformer, FORMATS, context.stats.input_amax)
    judge = comparison_of(transformer, others, 32)
    found = search.choose(6.0 * search.num_weights, comparison_of(transformer, clips, 32))
    ours = measure_choice(transformer, candidates, found.formats, judge)
    generator, rivals = np.random.default_rng(0), []
    while len(rivals) < 8:
        choice = tuple(int(generator.integers(len(group.options))) for group in search.groups)
        formats = search._formats(choice)
        if 5.5 * search.num_weights < search.bits(formats) <= 6.0 * search.num_weights:
            rivals.append(measure_choice(transformer, candidates, formats, judge))
    assert ours < 0.8 * float(np.median(rivals))


class Allied(nn.Module):
    """Five layers make the same error, which adds up; one makes another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.same = nn.ModuleList(nn.Linear(64, 16) for _ in range(5))
        self.rest = nn.Linear(64, 16)
        for layer in self.same:
            layer.load_state_dict(self.same[0].state_dict())
        self.rest.weight.data *= 1.25

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.flatten(3).mean((1, 2))
        y = self.rest(x / 2) * 2
        for power, layer in enumerate(self.same):
            y = y + layer(x * 2**power) / 2**power
        return y


def test_a_second_round_where_losses_do_not_add_up(
    wrap: Wrap, make_clips: MakeClips, make_context: MakeContext
) -> None:
    model = wrap(Allied())
    clips = make_clips(model, 16)
    search = search_of(model, clips, make_context(model, clips).stats.input_amax, ("nvfp4", "int8"))
    names = ("rest", *(f"same.{index}" for index in range(5)))
    assert len(search.groups) == len(names)
    # Enough for one layer in eight bits: that with the largest loss alone is not the one.
    alone = {name: search._sensitivities.of(name, "nvfp4") or 0.0 for name in names}
    assert max(alone, key=alone.__getitem__) == "rest"
    bits = search.bits({**dict.fromkeys(names, "nvfp4"), "rest": "int8"})
    comparison = comparison_of(model, clips, 16)
    found = search.choose(bits, comparison)
    assert found.formats["rest"] == "nvfp4"
    assert sorted(found.formats.values()) == ["int8"] + ["nvfp4"] * 5
    formats = {**dict.fromkeys(names, "nvfp4"), "rest": "int8"}
    assert found.measured_loss < measure_choice(model, search._candidates, formats, comparison)


def test_layers_can_be_left_to_choose_for_themselves(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips = make_clips(transformer, 16)
    candidates = freeze_candidates(
        transformer, FORMATS, make_context(transformer, clips).stats.input_amax
    )
    found = predict_sensitivities(transformer, candidates, clips, num_clips=16, seed=0)
    assert found.num_probes == 2
    free = PrecisionSearch(transformer, candidates, found, share_inputs=False)
    assert {group.layers for group in free.groups} == {(name,) for name in candidates}
    grouped = PrecisionSearch(transformer, candidates, found)
    comparison, bits = comparison_of(transformer, clips, 16), 5.5 * free.num_weights
    sums = [
        sum(found.of(*pair) or 0.0 for pair in each.choose(bits, comparison).formats.items())
        for each in (free, grouped)
    ]
    assert sums[0] <= sums[1]


class Routed(nn.Module):
    """One layer has no gradient, one runs for bright clips only, one pads by reflection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padded = nn.Conv3d(3, 3, 3, padding=1, padding_mode="circular")
        self.rounded, self.bright, self.head = (
            nn.Linear(64, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 8),
        )

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.rounded((clips + self.padded(clips)).flatten(3).mean((1, 2))).round()
        if float(clips.mean()) > 1:
            x = x + self.bright(x)
        return self.head(x)


@pytest.fixture
def routed(wrap: Wrap) -> VideoModel:
    module = Routed()
    model = wrap(module)
    # Found by running it once on an example, which is not bright.
    assert "bright" not in model.layers
    shape = tuple(module.bright.weight.shape)
    facts = type(model.layers["head"])(kind="linear", weight_shape=shape)
    return VideoModel(**{**model.__dict__, "layers": {**model.layers, "bright": facts}})


def test_every_layer_that_cannot_be_searched_has_a_reason(
    routed: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips = make_clips(routed, 24)
    context = make_context(routed, clips, budget=Budget("effective_bits", 12.0))
    assert "bright" not in context.stats.input_amax
    found = find_formats(routed, context)
    assert set(found.formats) == {"padded", "rounded", "head"}
    assert found.formats["padded"] == "keep"
    assert "pads by circular" in found.reasons["padded"]
    assert "measured loss" in found.reasons["rounded"] or "kept (" in found.reasons["rounded"]
    assert all(np.isfinite(score) for score in found.scores.values())


@pytest.mark.parametrize("kind", ["sqnr_db", "weight_bytes"])
def test_limits_of_quality_and_of_size(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext, kind: str
) -> None:
    clips = make_clips(transformer, 24)
    floats = sum(4 * each.numel() for each in transformer.module.parameters())
    num_weights = sum(each.weight.numel() for each in map(transformer.layer, transformer.layers))
    sizes = []
    for limit in (10.0, 40.0) if kind == "sqnr_db" else (0.30 * floats, 0.5 * floats):
        budget = Budget(kind, limit)  # type: ignore[arg-type]
        found = find_formats(transformer, make_context(transformer, clips, budget=budget))
        weights = sum(
            SPECS[each].weight_bits(transformer.layers[name].weight_shape)
            if each != "keep"
            else 32 * transformer.layer(name).weight.numel()
            for name, each in found.formats.items()
        )
        sizes.append(weights / num_weights)
        assert kind == "sqnr_db" or weights / 8 < limit
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget("effective_bits", 3.0), r"--budget-bits must be at least 5\.\d+ .* got 3; raise"),
        (Budget("weight_bytes", 100), r"--max-size must be at least \d+ bytes .* got 100; 0.00"),
        (Budget("weight_bytes", 7000), r"--max-size must be at least 1\d+ bytes .* got 7000;"),
    ],
)
def test_budgets_that_cannot_be_met(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext, budget: Budget,
    expected: str,
) -> None:  # fmt: skip
    context = make_context(transformer, make_clips(transformer, 8), budget=budget)
    with pytest.raises(InputError, match=expected):
        find_formats(transformer, context)


def test_a_weight_with_two_users_is_counted_once_more(
    wrap: Wrap, make_clips: MakeClips, make_context: MakeContext
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            x = clips.flatten(3).mean((1, 2))
            return self.head(x + self.table(torch.zeros(1, dtype=torch.long)))

    model = wrap(Tied())
    clips = make_clips(model, 8)
    table = 4 * 32 * 64
    with pytest.raises(InputError, match=f"{table / 1e6:.3f} MB of it stay as they are; raise it"):
        find_formats(model, make_context(model, clips, budget=Budget("weight_bytes", table - 1)))
    fits = Budget("weight_bytes", table + 32 * 64)
    assert find_formats(model, make_context(model, clips, budget=fits)).formats["head"] == "nvfp4"
