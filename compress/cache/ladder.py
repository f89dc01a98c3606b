"""What a search over caches tries: families of sections, each a ladder from exact to fast.

On a ladder one setting grows, so that quality falls and speed rises, nearly monotonously: a
bisection finds the last rung that is good enough. `schedule` spreads the computed steps as a power
of their order: above 1 they stand closer together early, where a denoiser changes most (in the
manner of LeMiCa, arXiv:2511.00090, without its graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vcompress.compress.cache.calibrate import Trajectory, fit
from vcompress.spec.cache_section import SETTINGS, CacheSection

__all__ = ["Ladder", "ladders", "schedule"]

_LEAST_THRESHOLD, _RATIO, _RUNGS = 0.01, 1.35, 16
_POWERS = (1.0, 1.5)
# Shares of the steps that are computed.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.52, 0.45, 0.4, 0.35, 0.3, 0.26, 0.22, 0.18)
_MAX_SKIPS = {"magcache": 8, "temporal_delta": 4}


@dataclass(frozen=True)
class Ladder:
    """Sections of one family, the most exact first."""

    name: str
    rungs: tuple[CacheSection, ...]


def ladders(num_steps: int, trajectories: Sequence[Trajectory]) -> list[Ladder]:
    """All families for a run of `num_steps`, fitted to `trajectories`."""
    found = []
    for policy, settings in SETTINGS.items():
        start = CacheSection(policy=policy, num_steps=num_steps)
        if "threshold" in settings:
            if policy in _MAX_SKIPS:
                start = replace(start, max_skips=_MAX_SKIPS[policy])
            start = fit(start, trajectories)
            thresholds = (round(_LEAST_THRESHOLD * _RATIO**rung, 4) for rung in range(_RUNGS))
            found.append(Ladder(policy, tuple(replace(start, threshold=x) for x in thresholds)))
    intervals = range(2, max(3, min(10, num_steps // 3)))
    for policy, order in (("taylorseer", 1), ("taylorseer", 2)):
        base = CacheSection(policy=policy, num_steps=num_steps, order=order)
        rungs = tuple(replace(base, interval=interval) for interval in intervals)
        found.append(Ladder(f"{policy} of order {order}", rungs))
    counts = [round(num_steps * share) for share in _SHARES]
    for power in _POWERS:
        base = CacheSection(policy="fixed", num_steps=num_steps)
        rungs = tuple(
            replace(base, compute_steps=schedule(num_steps, count, power, base.protect_first))
            for count in counts
        )
        found.append(Ladder(f"fixed, power {power:g}", rungs))
    return found


def schedule(num_steps: int, count: int, power: float, first: int) -> tuple[int, ...]:
    """About `count` steps to compute: the `first` ones, then spread, and the last one."""
    rest = max(1, count - first)
    span = num_steps - 1 - first
    spread = (first + round(span * (index / rest) ** power) for index in range(rest + 1))
    return tuple(sorted({*range(min(first, num_steps)), *spread, num_steps - 1}))
