"""A classifier that was given other classes than its own, told from one that knows them."""

from __future__ import annotations

import numpy as np
import pytest

from vcompress.validate.gate import judge
from vcompress.validate.guessing import answers_like_guessing, why_guessing
from vcompress.validate.metrics import compare_outputs


@pytest.mark.parametrize(
    ("num_right", "num_clips", "num_classes", "expected"),
    [
        # Of four throws of a coin: P(4) = 1/16 = 0.0625; of five: P(5) = 1/32.
        (4, 4, 2, True), (5, 5, 2, False),
        # P(at least 4 of 5) = 6/32.
        (4, 5, 2, True),
        # P(at least 3 of 3) = 1/64 of four classes; P(at least 2 of 3) = 10/64.
        (3, 3, 4, False), (2, 3, 4, True),
        (0, 1000, 400, True), (60, 1000, 400, False), (0, 3, 1, False), (1000, 1000, 2, False),
    ],
)  # fmt: skip
def test_the_exact_binomial_tail(
    num_right: int, num_clips: int, num_classes: int, expected: bool
) -> None:
    assert expected is answers_like_guessing(
        num_right=num_right, num_clips=num_clips, num_classes=num_classes
    )


def test_the_reason_counts_and_names_what_to_look_at() -> None:
    assert why_guessing(num_right=90, num_clips=100, num_classes=20) == ""
    reason = why_guessing(num_right=5, num_clips=100, num_classes=20)
    assert "right on 5 of 100 clips" in reason
    assert "alphabetical order" in reason
    assert "--mean" in reason


def test_no_drop_is_proven_on_a_baseline_that_guesses() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((1000, 20))
    right, other = scores.argmax(axis=1), rng.integers(0, 20, 1000)
    fits = judge(compare_outputs(scores, scores, labels=right, task="classify"), max_drop_points=1)
    assert fits.outcome == "pass"
    wrong = judge(compare_outputs(scores, scores, labels=other, task="classify"), max_drop_points=1)
    assert wrong.outcome == "inconclusive"
    assert wrong.clips_needed is None
    assert "says nothing" in wrong.reason
    # Without labels there is nothing to be wrong about.
    blind = judge(compare_outputs(scores, scores, labels=None, task="classify"), max_drop_points=1)
    assert blind.outcome == "pass"
