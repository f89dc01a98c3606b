"""Has it become slower? A verdict that survives a noisy machine.

What: two arms are timed in fresh process pairs, each pair in quads A B B A or B A A B. In the
difference of a quad, mean log B minus mean log A, a drift that is linear in time cancels. What a
process draws once (layout, cores) does not average out within it, so pairs are the unit: the
estimate is the mean over pairs of the trimmed mean over quads, and its standard error is the
larger of what the pairs and what the quads say (Kalibera and Jones, "Rigorous benchmarking in
reasonable time", 2013, for the levels; interleaved trials after Laaber et al., 2019). The rule
looks after 6, 9 and 12 pairs. It is tuned to a slow-down of 5 %: a pass means that 5 % is excluded,
a regression that more than 1 % is established and that it matters, and what the noise hides is
inconclusive, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vcompress.spec.errors import InputError

__all__ = [
    "LOOKS", "NUM_QUADS", "PRESETS", "Estimate", "Noise", "RegressionOutcome", "RegressionVerdict",
    "decide", "estimate", "minus", "simulate_quads", "simulated_outcome", "verdict",
]  # fmt: skip

RegressionOutcome = Literal["pass", "regression", "inconclusive"]
LOOKS = (6, 9, 12)
NUM_QUADS = 10
_WIDTH = 2.5
_TOLERANCE, _CUT, _TARGET = math.log(1.01), math.log(1.025), math.log(1.05)
# With this standard error 5 % and 0 % lie far enough on either side of the cut.
_RESOLVES = 0.012
_TRIM = 0.2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How much slower B is than A.

    Attributes:
        log_ratio: natural logarithm of the time of B over the time of A.
        standard_error: of it.
        num_pairs: process pairs; 0 if the pairs of two runs were put together.
    """

    log_ratio: float
    standard_error: float
    num_pairs: int

    @property
    def percent(self) -> float:
        """The slow-down in percent; negative is faster."""
        return 100 * math.expm1(self.log_ratio)

    @property
    def interval_percent(self) -> tuple[float, float]:
        """The interval that the verdict looks at, 2.5 standard errors to each side."""
        reach = _WIDTH * self.standard_error
        return (
            100 * math.expm1(self.log_ratio - reach),
            100 * math.expm1(self.log_ratio + reach),
        )


@dataclass(frozen=True, kw_only=True)
class RegressionVerdict:
    """The outcome and the numbers that it rests on."""

    outcome: RegressionOutcome
    reason: str
    slowdown_percent: float | None
    lower_percent: float | None
    upper_percent: float | None
    standard_error_percent: float | None
    num_pairs: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(self.__dict__)


def estimate(quads: NDArray[np.float64]) -> Estimate:
    """The slow-down from the differences of quads `[pairs, quads]`, in logarithms.

    Raises:
        InputError: fewer than two pairs or two quads, or a difference that is not finite.
    """
    if quads.ndim != 2 or min(quads.shape) < 2 or not np.isfinite(quads).all():
        message = (
            "an estimate needs finite differences of at least 2 process pairs with 2 quads each, "
            f"got shape {quads.shape}"
        )
        raise InputError(message)
    pairs, per_pair = quads.shape
    cut = int(_TRIM * per_pair)
    means = np.sort(quads, axis=1)[:, cut : per_pair - cut].mean(axis=1)
    deviations = np.abs(quads - np.median(quads, axis=1, keepdims=True))
    within = 1.4826 * float(np.median(deviations)) * math.sqrt(per_pair / (per_pair - 1))
    # Never trust a lucky small spread of few pairs.
    error = max(
        float(means.std(ddof=1)) / math.sqrt(pairs), 1.1 * within / math.sqrt(pairs * per_pair)
    )
    return Estimate(log_ratio=float(means.mean()), standard_error=error, num_pairs=pairs)


def minus(new: Estimate, old: Estimate) -> Estimate:
    """The slow-down between two runs that were each compared with the same third."""
    return Estimate(
        log_ratio=new.log_ratio - old.log_ratio,
        standard_error=math.hypot(new.standard_error, old.standard_error),
        num_pairs=new.num_pairs,
    )


def decide(found: Estimate, *, last: bool) -> RegressionOutcome | None:
    """The outcome after a look; None where another look is due."""
    reach = _WIDTH * found.standard_error
    if found.log_ratio - reach > _TOLERANCE and found.log_ratio > _CUT:
        return "regression"
    if found.log_ratio + reach < _TARGET and found.log_ratio < _CUT:
        return "pass"
    if not last:
        return None
    if found.standard_error > _RESOLVES:
        return "inconclusive"
    return "regression" if found.log_ratio > _CUT else "pass"


def verdict(found: Estimate, outcome: RegressionOutcome) -> RegressionVerdict:
    """The outcome in words, with its numbers."""
    lower, upper = found.interval_percent
    seen = f"{found.percent:+.1f} % in time [{lower:+.1f}, {upper:+.1f}]"
    reason = {
        "pass": f"{seen}: not slower by 5 %.",
        "regression": f"{seen}: slower.",
        "inconclusive": f"{seen}: this machine is too noisy now to tell 5 % from nothing.",
    }[outcome]
    return RegressionVerdict(
        outcome=outcome, reason=reason, slowdown_percent=found.percent, lower_percent=lower,
        upper_percent=upper, standard_error_percent=100 * found.standard_error,
        num_pairs=found.num_pairs,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A machine: standard deviations in logarithms, chances a block.

    Attributes:
        block: of a block's time.
        drift: step of a random walk, a block.
        enter: chance that a burst of load begins.
        leave: chance that it ends.
        amplitude: the most that a burst slows down.
        spike: chance of a spike in one of the three calls of a block.
        spike_scale: mean of its height.
        process: what each process draws once.
    """

    block: float
    drift: float
    enter: float
    leave: float
    amplitude: float
    spike: float
    spike_scale: float
    process: float


PRESETS = {
    "calm": Noise(
        block=0.015, drift=0.002, enter=0.005, leave=0.2, amplitude=0.15, spike=0.01,
        spike_scale=0.15, process=0.003,
    ),
    "typical": Noise(
        block=0.04, drift=0.006, enter=0.03, leave=0.15, amplitude=0.35, spike=0.05,
        spike_scale=0.25, process=0.006,
    ),
    "harsh": Noise(
        block=0.08, drift=0.01, enter=0.08, leave=0.15, amplitude=0.6, spike=0.1,
        spike_scale=0.4, process=0.01,
    ),
}  # fmt: skip


def simulate_quads(noise: Noise, slowdown: float, *, runs: int, seed: int) -> NDArray[np.float64]:
    """Differences `[runs, pairs, quads]` of a machine with this noise and a true slow-down.

    Args:
        slowdown: as a share; 0.05 is 5 %.
    """
    rng = np.random.default_rng(seed)
    shape = (runs, LOOKS[-1], NUM_QUADS, 4)
    blocks = shape[1] * shape[2] * 4
    drift = rng.normal(0, noise.drift, (runs, blocks)).cumsum(axis=1)
    burst, height = np.zeros((runs, blocks)), np.zeros(runs)
    for index in range(blocks):
        starts = (height == 0) & (rng.random(runs) < noise.enter)
        ends = (height > 0) & (rng.random(runs) < noise.leave)
        height = np.where(starts, rng.uniform(0, noise.amplitude, runs), height)
        height = np.where(ends, 0.0, height)
        burst[:, index] = height
    calls = rng.normal(0, noise.block, (*shape, 3))
    calls += (rng.random(calls.shape) < noise.spike) * rng.exponential(
        noise.spike_scale, calls.shape
    )
    times = np.median(calls, axis=-1) + (drift + burst).reshape(shape)
    process = rng.normal(0, noise.process, (*shape[:2], 1, 2))
    # Arms of a quad: 0 1 1 0 or 1 0 0 1.
    first = rng.integers(0, 2, (*shape[:3], 1))
    arm = first ^ np.array([0, 1, 1, 0])
    times += np.where(arm == 1, process[..., 1:] + math.log1p(slowdown), process[..., :1])
    quads: NDArray[np.float64] = np.where(arm == 1, times, -times).sum(axis=-1) / 2
    return quads


def simulated_outcome(quads: NDArray[np.float64], looks: Sequence[int] = LOOKS) -> str:
    """What the rule says of the differences `[pairs, quads]` of one run."""
    for look in looks:
        outcome = decide(estimate(quads[:look]), last=look == looks[-1])
        if outcome is not None:
            return outcome
    raise AssertionError
