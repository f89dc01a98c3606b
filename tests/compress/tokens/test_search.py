"""Schedules: their operations by hand, their search against what it should beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vcompress.compress.tokens.decide import too_few_clips
from vcompress.compress.tokens.flops import ScheduleCost, counts_of
from vcompress.compress.tokens.plan import constant_schedule, plan_constant, section_of
from vcompress.compress.tokens.search import TokenSearch, holds
from vcompress.compress.tokens.shapes import Candidate, Fitter, Site, starting_shapes
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.compress.tokens.trials import Measured, Trials
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError

Tiny = Callable[..., VideoModel]


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.7, 0.55])
def test_a_constant_schedule_keeps_the_ratio(ratio: float) -> None:
    counts = constant_schedule(1568, 12, ratio)
    assert np.mean(counts) / 1568 == pytest.approx(ratio, abs=0.001)
    assert counts[0] == 1568
    steps = -np.diff(counts)
    assert steps.max() - steps.min() <= 1


def test_a_ratio_that_cannot_be_reached_is_refused(tiny: Tiny) -> None:
    model = tiny("videomae")
    with pytest.raises(InputError, match=r"see 0\.41 on average"):
        plan_constant(model, 0.2, model.example())


def test_operations_by_hand(tiny: Tiny) -> None:
    cost = ScheduleCost.of(tiny("vivit"))
    # A block: query, key, value, output 4 x 32 x 32 and the MLP 2 x 32 x 64 = 8192 weights; with
    # the class token 11 tokens: 2 x 8192 x 11 + 4 x 32 x 11^2.
    assert cost.block(0, 10) == 2 * 8192 * 11 + 4 * 32 * 121
    # The embedding: 32 patches of 3 x 2 x 8 x 8 values to 32 channels.
    assert cost.rest == 2 * 32 * 32 * 384
    assert cost.share([32, 32, 32]) == 1.0


def test_every_shape_fits_any_budget(tiny: Tiny) -> None:
    fitter = Fitter(tiny("videomae"))
    shapes = list(starting_shapes(3))
    assert shapes
    for shape in shapes:
        sites = tuple(Site(block, "bipartite", share) for block, share in shape)
        section = fitter.fit(Candidate(sites, "plain"), 0.8)
        assert section is not None
        assert 0.7 < fitter.share_of(section) <= 0.8
    late = Candidate((Site(2, "bipartite", 0.5),), "plain")
    assert fitter.fit(late, 0.3) is None


@pytest.mark.parametrize(("first", "second"), [("places", "frames"), ("frames", "places")])
def test_whole_frames_of_fewer_places_are_fitted(tiny: Tiny, first: str, second: str) -> None:
    # 2 frames of 16 places: what is left of one decides what the other can keep.
    model = tiny("vivit")
    candidate = Candidate((Site(0, first, 0.5), Site(1, second, 0.25)), "plain")
    section = Fitter(model).fit(candidate, 0.55)
    assert section is not None
    kept = [section.sites[name].keep for name in model.token_blocks[:2]]
    # Half of the places of both frames, then one of the frames; or the other way round.
    assert kept[1] % (kept[0] // 2 if second == "frames" else 1) == 0
    planned = model.copy()
    apply_reduction(planned, section)
    assert torch.isfinite(planned(model.example())).all()


def test_a_model_of_one_block_says_why(tiny: Tiny) -> None:
    model = tiny("vivit", num_hidden_layers=1)
    with pytest.raises(InputError, match="tokens are reduced in front of repeated blocks, and fam"):
        plan_constant(model, 0.5, model.example(2))


def test_bars_are_read_off_the_clips() -> None:
    assert holds(Budget("drop_points", 0.5), Measured(loss=9.0, changed_points=0.5))
    assert not holds(Budget("drop_points", 0.5), Measured(loss=0.0, changed_points=0.6))
    # 20 dB: an error of a hundredth of the signal's energy.
    assert holds(Budget("sqnr_db", 20), Measured(loss=0.01, changed_points=0.0))
    assert not holds(Budget("sqnr_db", 20), Measured(loss=0.011, changed_points=0.0))


@pytest.fixture(scope="module")
def penvideo() -> tuple[VideoModel, list[torch.Tensor]]:
    from vcompress.calib.sources import open_clips

    model = load_model("reference:penvideo20")
    clips = open_clips(
        "reference:penvideo20", model.clip, part="test", limit=128, seed=0, labels=model.labels
    )
    return model, [torch.from_numpy(batch) for batch in clips.batches(64)]


def test_the_search_beats_a_constant_schedule_on_other_clips(
    penvideo: tuple[VideoModel, list[torch.Tensor]],
) -> None:
    model, (seen, *others) = penvideo
    share = 0.5
    found = TokenSearch(Trials(model, [seen]), max_moves=8).at_share(share)
    assert found.flop_share <= share
    judge = Trials(model, others)
    cost = ScheduleCost.of(model)
    constant = next(
        section
        for ratio in np.arange(0.7, 0.3, -0.01)
        for section in [
            section_of(model, constant_schedule(128, 4, float(ratio)), "bipartite", "plain")
        ]
        if cost.share(counts_of(section, model.token_blocks)) <= share
    )
    assert judge.measure(found.section).loss < judge.measure(constant).loss


def test_pixels_may_stand_in_front_of_matching(
    penvideo: tuple[VideoModel, list[torch.Tensor]],
) -> None:
    model, (seen, *_) = penvideo
    # Without a move the winner is one of the starting points.
    trials = Trials(model, [seen[:32]])
    found = TokenSearch(trials, max_moves=0).at_share(0.25)
    assert found.flop_share <= 0.25
    mixed = [
        Candidate((Site(0, first, 0.6), Site(1, "bipartite", 0.4)), attention)
        for first in ("static_frames", "detail")
        for attention in ("plain", "proportional")
    ]
    fitter = Fitter(model)
    for section in (fitter.fit(candidate, 0.25) for candidate in mixed):
        assert section is not None
        assert found.measured.loss <= trials.measure(section).loss


def test_a_bar_of_no_change_is_held(penvideo: tuple[VideoModel, list[torch.Tensor]]) -> None:
    model, (seen, *_) = penvideo
    found = TokenSearch(Trials(model, [seen[:24]])).within(Budget("drop_points", 0.0))
    assert found is not None
    assert found.measured.changed_points == 0.0
    assert found.flop_share < 0.9


def test_a_bar_of_less_than_one_clip_is_told() -> None:
    half = Budget("drop_points", 0.5)
    told = too_few_clips(half, 64)
    assert told is not None
    assert "200 (--num-clips) let the search go on" in told
    # One of 200 clips is half a point: this bar lets it change.
    assert too_few_clips(half, 200) is None
    fine = too_few_clips(Budget("drop_points", 0.1), 64)
    assert fine is not None
    assert "up to 256" in fine
    assert too_few_clips(Budget("sqnr_db", 30.0), 1) is None
