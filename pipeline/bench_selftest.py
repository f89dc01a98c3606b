"""Does the benchmark tell the truth on this machine?

First the rule itself, on simulated machines. Then, live, the yardstick against itself, which must
be cleared, and against itself doing 5 % more of the same work, which must be found. More work, not
a sleep: a sleep suffers neither from a neighbour nor from a clock, and would flatter the rule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from vcompress.pipeline.process_pairs import Arm, measure_arms
from vcompress.pipeline.run import Progress, Silent
from vcompress.validate.latency import describe_device
from vcompress.validate.regression import (
    PRESETS,
    RegressionOutcome,
    RegressionVerdict,
    decide,
    simulate_quads,
    simulated_outcome,
    verdict,
)

__all__ = ["Selftest", "selftest"]

_SIMULATED_RUNS = 400
_SLOW = 105
# Allowances of the rule, and on top of them what chance does to so many runs.
_MAX_FALSE, _MIN_FOUND = 0.02, 0.95
_MARGIN = 0.015


@dataclass(frozen=True, kw_only=True)
class Selftest:
    """What the rule said, by noise and truth.

    Attributes:
        simulated: outcomes of simulated runs: noise -> truth ("same", "slower") -> counts.
        live: the runs on this machine: truth -> verdicts.
    """

    simulated: dict[str, dict[str, dict[str, int]]]
    live: dict[str, list[RegressionVerdict]]
    device: dict[str, Any]

    @property
    def outcome(self) -> RegressionOutcome:
        """`regression` if a verdict was wrong, `inconclusive` if one was missing, else `pass`."""
        for truths in self.simulated.values():
            same, slower = truths["same"], truths["slower"]
            false = same.get("regression", 0) / sum(same.values())
            found = slower.get("regression", 0) / sum(slower.values())
            if false > _MAX_FALSE + _MARGIN or found < _MIN_FOUND - _MARGIN:
                return "regression"
        same_live = Counter(one.outcome for one in self.live["same"])
        slower_live = Counter(one.outcome for one in self.live["slower"])
        if same_live["regression"] or slower_live["pass"]:
            return "regression"
        return "inconclusive" if (same_live + slower_live)["inconclusive"] else "pass"

    @property
    def reason(self) -> str:
        """The outcome in words."""
        return {
            "pass": "An unchanged program is cleared and 5 % more work is found.",
            "regression": "A verdict was wrong: do not gate on times of this machine.",
            "inconclusive": "No verdict was wrong, but this machine is too noisy for some.",
        }[self.outcome]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        live = {name: [one.as_dict() for one in found] for name, found in self.live.items()}
        return {
            "schema": 1, "command": "bench selftest", "outcome": self.outcome,
            "reason": self.reason, "simulated": self.simulated, "live": live,
            "device": self.device,
        }  # fmt: skip


def selftest(
    *, runs: int = 1, simulated_runs: int = _SIMULATED_RUNS, progress: Progress | None = None
) -> Selftest:
    """Test the rule on simulated machines, and `runs` times of each kind on this one."""
    progress = progress or Silent()
    simulated: dict[str, dict[str, dict[str, int]]] = {}
    with progress.stage("simulated machines", 2 * len(PRESETS)) as advance:
        for seed, (name, noise) in enumerate(PRESETS.items()):
            simulated[name] = {}
            for truth, slowdown in (("same", 0.0), ("slower", 0.05)):
                quads = simulate_quads(noise, slowdown, runs=simulated_runs, seed=seed)
                simulated[name][truth] = dict(Counter(simulated_outcome(one) for one in quads))
                advance(1)
    live: dict[str, list[RegressionVerdict]] = {"same": [], "slower": []}
    for _ in range(runs):
        for truth, arm in (("same", Arm()), ("slower", Arm(repeat=_SLOW))):
            found, outcome = measure_arms(
                Arm(), arm, lambda estimate, last: decide(estimate, last=last), progress
            )
            live[truth].append(verdict(found, outcome))
    return Selftest(simulated=simulated, live=live, device=describe_device(1))
