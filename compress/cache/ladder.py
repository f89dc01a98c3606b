"""What a search over caches tries: families of sections, each a ladder from exact to fast.

On a ladder one setting grows, so that quality falls and speed rises, nearly monotonously: a
bisection finds the last rung that is good enough. `schedules` holds the lists of steps that
`compress.cache.schedule` finds; the family `fixed` is the control, with evenly spread ones.

What is fitted to clips looks better on them than on others. So a ladder of a fitted family has
every rung once more for each clip, fitted to the others: the quality that a search sees is that of
clips which the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vcompress.compress.cache.calibrate import Trajectory, fit
from vcompress.compress.cache.schedule import Runs, Schedule, Scheduler
from vcompress.spec.cache_section import SETTINGS, CacheSection

__all__ = ["Ladder", "Probe", "evenly_spread", "ladders", "listed", "schedules"]

_LEAST_THRESHOLD, _RATIO, _RUNGS = 0.01, 1.35, 16
# Shares of the steps that are computed.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.52, 0.45, 0.4, 0.35, 0.3, 0.26, 0.22, 0.18)
_MAX_SKIPS = {"magcache": 8, "temporal_delta": 4}
# A weight of the steps takes as many measured ones.
_LEAST_PROBES = 3

# Of each clip, the generations (from 1) that a fit for it must not see.
Folds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Ladder:
    """Sections of one family, the most exact first.

    Attributes:
        name: of the family.
        rungs: fitted to all clips.
        refits: for every rung, by clip, the same fitted to the others; empty where nothing is
            fitted.
    """

    name: str
    rungs: tuple[CacheSection, ...]
    refits: tuple[tuple[CacheSection, ...], ...] = ()

    def refit(self, rung: int, count: int) -> tuple[CacheSection, ...]:
        """What runs on each of `count` clips in a trial of a rung."""
        return self.refits[rung] if self.refits else (self.rungs[rung],) * count


@dataclass(frozen=True)
class Probe:
    """A run in which one step alone was reused: its squared error over that of the step."""

    generation: int
    step: int
    weight: float


def ladders(num_steps: int, trajectories: Sequence[Trajectory], folds: Folds = ()) -> list[Ladder]:
    """All families for a run of `num_steps`, fitted to `trajectories`."""
    found = [
        _rising(CacheSection(policy=policy, num_steps=num_steps), trajectories, folds)
        for policy, settings in SETTINGS.items()
        if "threshold" in settings
    ]
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


def _rising(start: CacheSection, trajectories: Sequence[Trajectory], folds: Folds) -> Ladder:
    """A family with a threshold."""
    policy = start.policy
    if policy in _MAX_SKIPS:
        start = replace(start, max_skips=_MAX_SKIPS[policy])
    fitted = fit(start, trajectories)
    thresholds = tuple(round(_LEAST_THRESHOLD * _RATIO**rung, 4) for rung in range(_RUNGS))
    others = [_others(trajectories, left_out) for left_out in folds] if fitted != start else []
    refitted = [fit(start, each) for each in others]
    return Ladder(
        policy,
        tuple(replace(fitted, threshold=value) for value in thresholds),
        tuple(tuple(replace(one, threshold=value) for one in refitted) for value in thresholds)
        if refitted
        else (),
    )


def _others(trajectories: Sequence[Trajectory], left_out: Sequence[int]) -> Sequence[Trajectory]:
    """All but those of `left_out`; all if no others are left."""
    return [each for each in trajectories if each.generation not in left_out] or trajectories


def listed(
    num_steps: int, steps: Sequence[int], mixture: Sequence[tuple[float, ...]],
    starts: Sequence[int] = (0,),
) -> CacheSection:  # fmt: skip
    """Exactly `steps` are computed, the others are mixtures; `starts` are those of denoisers."""
    return CacheSection(
        policy="forecast", num_steps=num_steps, protect_first=0, protect_last=0,
        compute_steps=tuple(steps), mixture=tuple(mixture), starts=tuple(starts),
    )  # fmt: skip


def schedules(runs: Runs, probes: Sequence[Probe], folds: Folds = ()) -> Ladder:
    """A rung for every length of the cheapest schedules; all steps is no rung."""

    def cheapest(left_out: Sequence[int]) -> Mapping[int, Schedule]:
        seen = [probe for probe in probes if probe.generation not in left_out]
        known = seen if len(seen) >= _LEAST_PROBES else probes
        found = Scheduler(
            runs.without(left_out), {probe.step: probe.weight for probe in known}
        ).cheapest()
        return {len(one.compute_steps): one for one in found}

    of_all, others = cheapest(()), [cheapest(left_out) for left_out in folds]
    counts = sorted((count for count in of_all if count < runs.num_steps), reverse=True)
    rungs = tuple(_section(of_all[count], runs) for count in counts)
    refits = tuple(tuple(_section(one[count], runs) for one in others) for count in counts)
    return Ladder("schedule", rungs, refits if others else ())


def _section(found: Schedule, runs: Runs) -> CacheSection:
    return listed(runs.num_steps, found.compute_steps, found.mixture, runs.starts)


def evenly_spread(num_steps: int, count: int, first: int) -> tuple[int, ...]:
    """About `count` steps to compute: the `first` ones, then evenly, and the last one."""
    rest = max(1, count - first)
    span = num_steps - 1 - first
    spread = (first + round(span * index / rest) for index in range(rest + 1))
    return tuple(sorted({*range(min(first, num_steps)), *spread, num_steps - 1}))
