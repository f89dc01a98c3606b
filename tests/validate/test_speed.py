"""The bar for the speed-up: three outcomes, and both gates in one verdict."""

from __future__ import annotations

import math

import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.gate import Verdict
from vcompress.validate.regression import Estimate
from vcompress.validate.speed import decide_speed, speed_verdict, with_speed


def measured(speed: float, error: float, pairs: int = 6) -> Estimate:
    return Estimate(log_ratio=-math.log(speed), standard_error=error, num_pairs=pairs)


@pytest.mark.parametrize(
    ("speed", "error", "early", "late"),
    [
        (1.60, 0.01, "pass", "pass"),
        (1.52, 0.01, None, "inconclusive"),
        (1.49, 0.01, None, "fail"),
        (1.40, 0.01, "fail", "fail"),
        (0.80, 0.50, None, "fail"),
    ],
)
def test_a_pass_needs_the_whole_interval(
    speed: float, error: float, early: str | None, late: str
) -> None:
    found = measured(speed, error)
    assert decide_speed(found, 1.5, last=False) == early
    assert decide_speed(found, 1.5, last=True) == late


def test_what_is_inconclusive_says_how_many_pairs_would_do() -> None:
    verdict = speed_verdict(measured(1.52, 0.01, 12), "inconclusive", 1.5)
    # 2.5 standard errors must fit between 1.52 and 1.5.
    assert verdict.pairs_needed == math.ceil(12 * (0.025 / math.log(1.52 / 1.5)) ** 2)
    assert f"about {verdict.pairs_needed} process pairs would, 12 were timed" in verdict.reason
    assert speed_verdict(measured(1.5000001, 0.01), "inconclusive", 1.5).pairs_needed is None
    low, high = verdict.speed_ratio_lower, verdict.speed_ratio_upper
    assert (low, high) == pytest.approx((1.52 * math.exp(-0.025), 1.52 * math.exp(0.025)))


@pytest.mark.parametrize("bar", [0.0, -1.0, math.inf, math.nan])
def test_a_bar_is_a_positive_number(bar: float) -> None:
    with pytest.raises(InputError, match="must be a positive number"):
        decide_speed(measured(1.0, 0.01), bar, last=True)


def test_the_worse_gate_counts_and_both_say_why() -> None:
    quality = Verdict(outcome="pass", reason="Good.", drop_points=0.1)
    slow = speed_verdict(measured(1.2, 0.01), "fail", 1.5)
    both = with_speed(quality, slow)
    assert both.outcome == "fail"
    assert both.reason == f"Good. {slow.reason}"
    assert (both.drop_points, both.min_speed_ratio) == (0.1, 1.5)
    fast = speed_verdict(measured(2.0, 0.01), "pass", 1.5)
    assert with_speed(Verdict(outcome="inconclusive", reason="Few."), fast).outcome == (
        "inconclusive"
    )
    assert with_speed(Verdict(outcome="not judged", reason="No bar."), fast).reason == fast.reason
    assert with_speed(quality, None) is quality
