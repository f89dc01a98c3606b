"""The gate: three outcomes, and "not judged" where there is nothing to judge by."""

from __future__ import annotations

import numpy as np
import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.gate import judge
from vcompress.validate.metrics import Metrics, compare_outputs


def classifier(num_clips: int, lost: int, won: int, *, labelled: bool = True) -> Metrics:
    """Metrics of two-class scores in which exactly `lost` clips got worse and `won` better."""
    labels = np.zeros(num_clips, dtype=np.int64)
    right, wrong = np.array([2.0, 1.0]), np.array([1.0, 2.0])
    baseline = np.tile(right, (num_clips, 1))
    candidate = baseline.copy()
    candidate[:lost] = wrong
    baseline[lost : lost + won] = wrong
    return compare_outputs(
        baseline, candidate, labels=labels if labelled else None, task="classify"
    )


@pytest.mark.parametrize(
    ("num_clips", "lost", "won", "bar", "outcome"),
    [
        # No change: 1 - 0.05^(1/n) is 0.99 points with 300 clips, 2.95 with 100.
        (300, 0, 0, 1.0, "pass"),
        (100, 0, 0, 1.0, "inconclusive"),
        # 10 of 500 lost is 2 points, above the bar.
        (500, 10, 0, 1.0, "fail"),
        # The example of test_paired: 1.2 points, upper bound 2.503.
        (500, 10, 4, 1.0, "fail"),
        (500, 10, 4, 2.0, "inconclusive"),
        (500, 10, 4, 2.6, "pass"),
        # At the bar is not above it.
        (100, 1, 0, 1.0, "inconclusive"),
        # Better than the baseline: 20 won of 500 bound the drop below zero.
        (500, 0, 20, 0.0, "pass"),
        # One clip proves nothing, but it can show a loss.
        (1, 0, 0, 1.0, "inconclusive"),
        (1, 1, 0, 1.0, "fail"),
    ],
)
def test_outcomes(num_clips: int, lost: int, won: int, bar: float, outcome: str) -> None:
    verdict = judge(classifier(num_clips, lost, won), max_drop_points=bar)
    assert verdict.outcome == outcome
    assert verdict.metric == "top1_drop"
    assert verdict.drop_points == pytest.approx(100 * (lost - won) / num_clips)
    assert verdict.max_drop_points == bar


def test_inconclusive_says_how_many_clips_it_would_take() -> None:
    verdict = judge(classifier(100, 0, 0), max_drop_points=1.0)
    assert verdict.clips_needed == 299
    assert "299 clips" in verdict.reason
    # A drop of 0.6 points at 1 % disagreement: 6.18256 * (0.010 - 0.006^2) / 0.004^2 = 3850.2.
    verdict = judge(classifier(1000, 8, 2), max_drop_points=1.0)
    assert verdict.outcome == "inconclusive"
    assert verdict.clips_needed == 3851
    at_bar = judge(classifier(100, 1, 0), max_drop_points=1.0)
    assert at_bar.clips_needed is None
    assert "too near to the bar" in at_bar.reason


def test_a_miss_that_few_clips_do_not_establish_is_said_to_be_one() -> None:
    few = judge(classifier(20, 1, 0), max_drop_points=1.0)
    assert few.outcome == "fail"
    assert "do not establish" in few.reason
    many = judge(classifier(2000, 100, 0), max_drop_points=1.0)
    assert many.outcome == "fail"
    assert "establish" not in many.reason


def test_without_labels_every_change_counts_as_lost() -> None:
    verdict = judge(classifier(500, 6, 4, labelled=False), max_drop_points=1.0)
    assert verdict.metric == "top1_disagreement"
    assert verdict.drop_points == pytest.approx(2.0)
    assert verdict.outcome == "fail"
    assert "no labels" in verdict.reason


def outputs(noise: float) -> Metrics:
    b = np.ones((4, 10))
    return compare_outputs(b, b * (1 + noise), labels=None, task="denoise")


def test_other_outputs_are_held_to_sqnr_or_not_judged() -> None:
    # An error of 1 % is 40 dB.
    assert judge(outputs(0.01), max_drop_points=None, min_sqnr_db=39.9).outcome == "pass"
    failed = judge(outputs(0.01), max_drop_points=None, min_sqnr_db=40.1)
    assert failed.outcome == "fail"
    assert failed.sqnr_db == pytest.approx(40.0)
    unjudged = judge(outputs(0.01), max_drop_points=1.0)
    assert unjudged.outcome == "not judged"
    assert "SQNR" in unjudged.reason
    assert judge(outputs(0.01), max_drop_points=None).reason == "No bar is set."
    assert judge(outputs(0.0), max_drop_points=None, min_sqnr_db=200.0).outcome == "pass"


def test_sqnr_of_a_silent_baseline_cannot_pass() -> None:
    zero = np.zeros((2, 3))
    metrics = compare_outputs(zero, zero + 1, labels=None, task="generic")
    assert judge(metrics, max_drop_points=None, min_sqnr_db=0.0).outcome == "fail"


def test_a_classifier_may_be_held_to_both() -> None:
    metrics = classifier(400, 0, 0) | {"sqnr_db": 12.0, "identical": False}
    assert judge(metrics, max_drop_points=1.0, min_sqnr_db=10.0).outcome == "pass"
    verdict = judge(metrics, max_drop_points=1.0, min_sqnr_db=20.0)
    assert (verdict.outcome, verdict.metric) == ("fail", "sqnr")
    assert judge(metrics, max_drop_points=None, min_sqnr_db=20.0).outcome == "fail"


def test_nothing_to_judge() -> None:
    assert judge(None, max_drop_points=1.0).outcome == "not judged"
    assert judge(classifier(400, 0, 0), max_drop_points=None).outcome == "not judged"


@pytest.mark.parametrize("bar", [-0.1, 101.0, float("nan")])
def test_a_bar_must_be_possible(bar: float) -> None:
    with pytest.raises(InputError, match="0 to 100"):
        judge(classifier(10, 0, 0), max_drop_points=bar)
