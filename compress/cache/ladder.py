"""What a search over caches tries: families of sections, each a ladder from exact to fast.

On a ladder one setting grows, so that quality falls and speed rises, nearly monotonously: a
bisection finds the last rung that is good enough. `schedules` holds the lists of steps that
`compress.cache.schedule` finds; the family `fixed` is the control, with evenly spread ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vcompress.compress.cache.calibrate import Trajectory, fit
from vcompress.spec.cache_section import SETTINGS, CacheSection

__all__ = ["Ladder", "evenly_spread", "ladders", "listed", "schedules"]

_LEAST_THRESHOLD, _RATIO, _RUNGS = 0.01, 1.35, 16
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
    base = CacheSection(policy="fixed", num_steps=num_steps)
    spread = (evenly_spread(num_steps, count, base.protect_first) for count in counts)
    found.append(Ladder("fixed", tuple(replace(base, compute_steps=steps) for steps in spread)))
    return found


def listed(num_steps: int, steps: Sequence[int]) -> CacheSection:
    """Exactly `steps` are computed, the others continued along a line."""
    return CacheSection(
        policy="taylorseer", num_steps=num_steps, protect_first=0, protect_last=0, order=1,
        compute_steps=tuple(steps),
    )  # fmt: skip


def schedules(num_steps: int, found: Sequence[tuple[float, tuple[int, ...]]]) -> Ladder:
    """A rung for every length of what `cheapest_schedules` found; all steps is no rung."""
    lists = [steps for _, steps in found if steps and len(steps) < num_steps]
    return Ladder("schedule", tuple(listed(num_steps, steps) for steps in reversed(lists)))


def evenly_spread(num_steps: int, count: int, first: int) -> tuple[int, ...]:
    """About `count` steps to compute: the `first` ones, then evenly, and the last one."""
    rest = max(1, count - first)
    span = num_steps - 1 - first
    spread = (first + round(span * index / rest) for index in range(rest + 1))
    return tuple(sorted({*range(min(first, num_steps)), *spread, num_steps - 1}))
