"""The paired drop: bounds and sample sizes, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.paired import clips_needed, paired_drop


def test_bonett_price_bounds_by_hand() -> None:
    # n = 500, 10 lost, 4 won: p = 11/502 = 0.0219124, q = 5/502 = 0.00996016,
    # p - q = 6/502 = 0.0119522, p + q = 16/502 = 0.0318725,
    # variance = (0.0318725 - 0.0119522^2) / 502 = 0.0317297 / 502 = 6.32065e-5,
    # z * sqrt(variance) = 1.644854 * 0.00795025 = 0.0130770.
    drop = paired_drop(num_clips=500, num_right_to_wrong=10, num_wrong_to_right=4)
    assert drop.drop_points == pytest.approx(1.2)
    assert drop.upper_points == pytest.approx(2.50292, abs=2e-4)
    assert drop.lower_points == pytest.approx(-0.11248, abs=2e-4)
    assert drop.disagreement == pytest.approx(0.028)


def test_swapped_models_mirror_the_interval() -> None:
    forward = paired_drop(num_clips=300, num_right_to_wrong=7, num_wrong_to_right=2)
    backward = paired_drop(num_clips=300, num_right_to_wrong=2, num_wrong_to_right=7)
    assert forward.drop_points == -backward.drop_points
    assert forward.upper_points == pytest.approx(-backward.lower_points)
    assert forward.lower_points == pytest.approx(-backward.upper_points)


def test_no_difference_at_all_follows_the_rule_of_three() -> None:
    # 1 - 0.05^(1/n) is 3/n to first order; 299 clips certify one point, 298 do not.
    for count in (300, 3000):
        drop = paired_drop(num_clips=count, num_right_to_wrong=0, num_wrong_to_right=0)
        assert drop.upper_points == pytest.approx(300 / count, rel=0.01)
        assert drop.lower_points == -drop.upper_points
    enough = paired_drop(num_clips=299, num_right_to_wrong=0, num_wrong_to_right=0)
    short = paired_drop(num_clips=298, num_right_to_wrong=0, num_wrong_to_right=0)
    assert enough.upper_points < 1.0 < short.upper_points


def test_single_clip_is_bounded_by_all_and_nothing() -> None:
    lost = paired_drop(num_clips=1, num_right_to_wrong=1, num_wrong_to_right=0)
    assert (lost.drop_points, lost.upper_points) == (100.0, 100.0)
    same = paired_drop(num_clips=1, num_right_to_wrong=0, num_wrong_to_right=0)
    assert same.upper_points == pytest.approx(95.0)


@pytest.mark.parametrize("counts", [(0, 0, 0), (10, -1, 0), (10, 6, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="paired comparison"):
        paired_drop(num_clips=counts[0], num_right_to_wrong=counts[1], num_wrong_to_right=counts[2])


@pytest.mark.parametrize(
    ("disagreement", "drop", "margin", "power", "expected"),
    [
        # n = (z_alpha + z_beta)^2 (p_d - delta^2) / (margin - delta)^2, one-sided 5 %:
        # (1.64485 + 0.84162)^2 = 6.18256; 6.18256 * 0.01 / 0.01^2 = 618.3
        (0.01, 0.0, 1.0, 0.8, 619),
        (0.02, 0.0, 1.0, 0.8, 1237),
        (0.05, 0.0, 1.0, 0.8, 3092),
        # (1.64485 + 1.64485)^2 = 10.8222; 10.8222 * 0.02 / 0.01^2 = 2164.4
        (0.02, 0.0, 1.0, 0.95, 2165),
        # (1.64485 + 1.28155)^2 = 8.56385; * (0.01 - 0.003^2) / 0.007^2 = 1746.2
        (0.01, 0.3, 1.0, 0.9, 1747),
        (0.02, 0.0, 2.0, 0.9, 429),
        # No difference seen: the smallest n with 1 - 0.05^(1/n) <= 1 %.
        (0.0, 0.0, 1.0, 0.8, 299),
    ],
)
def test_clips_needed(
    disagreement: float, drop: float, margin: float, power: float, expected: int
) -> None:
    assert expected == clips_needed(
        disagreement=disagreement, drop_points=drop, max_drop_points=margin, power=power
    )


def test_no_number_of_clips_settles_a_drop_at_the_bar() -> None:
    assert clips_needed(disagreement=0.05, drop_points=1.0, max_drop_points=1.0) is None
    assert clips_needed(disagreement=0.05, drop_points=0.9999, max_drop_points=1.0) is None
    assert clips_needed(disagreement=0.05, drop_points=-3.0, max_drop_points=1.0) == 3092


def test_a_model_at_the_margin_passes_about_one_time_in_twenty() -> None:
    # True drop of exactly 1 point at 5 % disagreement: a one-sided 95 % bound must fall below
    # it in some 5 % of the samples. 4,000 samples of 1,000 clips have a standard error of 0.35 %.
    rng = np.random.default_rng(0)
    lost = rng.multinomial(1000, (0.03, 0.02, 0.95), size=4000)
    passed = sum(
        paired_drop(
            num_clips=1000, num_right_to_wrong=int(b), num_wrong_to_right=int(c)
        ).upper_points
        <= 1.0
        for b, c, _ in lost
    )
    assert 0.035 < passed / 4000 < 0.065
