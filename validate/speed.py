"""Is the result as much faster as was asked for?

What: a bar for the speed-up has three outcomes, like that for quality. The two graphs are timed in
fresh process pairs in interleaved quads, as in `validate.regression`, whose estimate and interval
(2.5 standard errors to each side) this judges: a pass needs the whole interval at or above the bar,
an estimate below the bar fails, and what lies between is inconclusive, with the number of pairs
that would settle it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from vcompress.spec.errors import InputError
from vcompress.validate.gate import Outcome, Verdict
from vcompress.validate.regression import Estimate

__all__ = ["SpeedOutcome", "SpeedVerdict", "decide_speed", "speed_verdict", "with_speed"]

SpeedOutcome = Literal["pass", "fail", "inconclusive"]
# Beyond this a number of pairs is no advice any more.
_MAX_PAIRS = 1000
_WORST_FIRST: tuple[Outcome, ...] = ("fail", "inconclusive", "pass", "not judged")


@dataclass(frozen=True, kw_only=True)
class SpeedVerdict:
    """The outcome and the numbers that it rests on.

    Attributes:
        outcome: "pass", "fail" or "inconclusive".
        reason: one sentence for people.
        speed_ratio: how many times as fast as the baseline, on one core with one thread.
        speed_ratio_lower, speed_ratio_upper: the interval that the outcome rests on.
        min_speed_ratio: the bar.
        num_pairs: fresh process pairs that were timed.
        pairs_needed: pairs with which the interval would lie above the bar if the estimate is the
            truth; None where the matter is settled, or where the estimate lies too near to the bar.
    """

    outcome: SpeedOutcome
    reason: str
    speed_ratio: float
    speed_ratio_lower: float
    speed_ratio_upper: float
    min_speed_ratio: float
    num_pairs: int
    pairs_needed: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)


def decide_speed(found: Estimate, bar: float, *, last: bool) -> SpeedOutcome | None:
    """The outcome after a look; None where another look is due.

    Args:
        found: time of the result over that of the baseline.
        bar: the least speed-up, 1.5 for one and a half times as fast.
        last: no more pairs will be timed.

    Raises:
        InputError: a bar that is not positive.
    """
    if not 0 < bar < math.inf:
        message = f"the least speed-up must be a positive number such as 1.5, got {bar}"
        raise InputError(message)
    low, high = _interval(found)
    if low >= bar:
        return "pass"
    if high < bar:
        return "fail"
    if not last:
        return None
    return "fail" if math.exp(-found.log_ratio) < bar else "inconclusive"


def speed_verdict(found: Estimate, outcome: SpeedOutcome, bar: float) -> SpeedVerdict:
    """The outcome in words, with its numbers."""
    speed, (low, high) = math.exp(-found.log_ratio), _interval(found)
    needed = None
    text = f"Speed {speed:.2f}x [{low:.2f}, {high:.2f}] of the baseline on one core"
    if outcome == "pass":
        text += f" reaches the bar of {bar:g}x."
    elif outcome == "fail":
        text += f" misses the bar of {bar:g}x."
    else:
        needed = _pairs_needed(found, math.log(speed / bar))
        text += f" meets the bar of {bar:g}x, but does not establish it"
        text += (
            "; the speed is too near to the bar for more runs to help."
            if needed is None
            else f"; about {needed} process pairs would, {found.num_pairs} were timed."
        )
    return SpeedVerdict(
        outcome=outcome, reason=text, speed_ratio=speed, speed_ratio_lower=low,
        speed_ratio_upper=high, min_speed_ratio=bar, num_pairs=found.num_pairs,
        pairs_needed=needed,
    )  # fmt: skip


def with_speed(verdict: Verdict, speed: SpeedVerdict | None) -> Verdict:
    """Both gates in one verdict: the worse outcome, both reasons."""
    if speed is None:
        return verdict
    outcomes = (verdict.outcome, speed.outcome)
    judged = "" if verdict.outcome == "not judged" else f"{verdict.reason} "
    return replace(
        verdict,
        outcome=min(outcomes, key=_WORST_FIRST.index),
        reason=judged + speed.reason,
        speed_ratio=speed.speed_ratio,
        speed_ratio_lower=speed.speed_ratio_lower,
        speed_ratio_upper=speed.speed_ratio_upper,
        min_speed_ratio=speed.min_speed_ratio,
    )


def _interval(found: Estimate) -> tuple[float, float]:
    """The speed-up's interval."""
    slower, slowest = (1 + percent / 100 for percent in found.interval_percent)
    return 1 / slowest, 1 / slower


def _pairs_needed(found: Estimate, distance: float) -> int | None:
    if distance <= 0:
        return None
    reach = math.log1p(found.interval_percent[1] / 100) - found.log_ratio
    count = math.ceil(found.num_pairs * (reach / distance) ** 2)
    return max(count, found.num_pairs + 1) if count <= _MAX_PAIRS else None
