"""Find the cache policy and its settings for a quality target, on generated clips.

Every family of `compress.cache.ladder` is a ladder from exact to fast. The last rung that holds the
target on the calibration clips is found by bisection; of all families the one that skips most
wins. Quality is that of whole generated clips against the full model's from the same noise, so
errors that a sampler heals are not counted, and errors that it amplifies are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vcompress.compress.cache import CacheReport, Trajectory, apply_cache, observe
from vcompress.compress.cache.ladder import Ladder, ladders, listed, schedules
from vcompress.compress.cache.schedule import (
    cheapest_schedules,
    probe_steps,
    reuse_errors,
    weights_of,
)
from vcompress.pipeline.cache_sampler import Case, Sampler
from vcompress.pipeline.run import Progress
from vcompress.spec.cache_section import CacheSection
from vcompress.validate.frames import Frames, psnr_db, ssim

__all__ = ["METRICS", "Bar", "Found", "Search", "Trial", "run_section"]

METRICS: dict[str, Callable[[Frames, Frames], float]] = {"psnr_db": psnr_db, "ssim": ssim}
# A clip alone that is so far below ends a trial early.
_FAR = {"psnr_db": 4.0, "ssim": 0.1}


@dataclass(frozen=True)
class Bar:
    """A quality target: the mean of `metric` over clips is at least `least`."""

    metric: str
    least: float

    def holds(self, values: Sequence[float], *, margin: bool = False) -> bool:
        """Whether `values` of clips reach it, with a margin of one standard error if asked."""
        mean = float(np.mean(values))
        if margin and len(values) > 1:
            mean -= float(np.std(values, ddof=1)) / len(values) ** 0.5
        return mean >= self.least

    def is_far(self, value: float) -> bool:
        """Whether one clip says enough."""
        return value < self.least - _FAR[self.metric]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One section, run on clips."""

    section: CacheSection
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    report: CacheReport
    clips: tuple[Frames, ...] = field(repr=False)

    def values(self, metric: str) -> tuple[float, ...]:
        """By clip."""
        return self.psnr_db if metric == "psnr_db" else self.ssim

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "section": self.section.as_dict(), "psnr_db": list(self.psnr_db),
            "ssim": list(self.ssim), "skip_rate": self.report.skip_rate,
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The best rung of one family, and how many were tried; None if none holds the target."""

    name: str
    best: Trial | None
    num_trials: int


def _skip_rate(found: Found) -> float:
    return -1.0 if found.best is None else found.best.report.skip_rate


class Search:
    """Runs the full model once, then any number of caches against it."""

    def __init__(self, sampler: Sampler, cases: Sequence[Case], progress: Progress) -> None:
        """Generate `cases` with everything computed, and observe."""
        self._sampler, self._cases, self._progress = sampler, cases, progress
        with (
            progress.stage("full model", len(cases)) as advance,
            observe(sampler.denoisers) as trajectories,
        ):
            self._full: list[Frames] = []
            for case in cases:
                self._full.append(sampler.sample(case))
                advance(1)
        self._trajectories: list[Trajectory] = trajectories
        self._ladders: list[Ladder] = []

    def ladders(self) -> list[Ladder]:
        """What there is to try; the first call probes what a reused step does to the clips."""
        if not self._ladders:
            self._ladders = ladders(self._sampler.num_steps, self._trajectories)
            # Two denoisers share the steps, and what one adds says nothing of the other.
            if len(self._sampler.denoisers) == 1:
                self._ladders.insert(0, self._scheduled())
        return self._ladders

    def run(self, bar: Bar, families: Sequence[Ladder] | None = None) -> list[Found]:
        """The best of every family under `bar`, the one that skips most first."""
        families = self.ladders() if families is None else families
        found = []
        with self._progress.stage("search", len(families)) as advance:
            for family in families:
                found.append(self._climb(family, bar))
                advance(1)
        return sorted(found, key=_skip_rate, reverse=True)

    def trial(self, section: CacheSection, bar: Bar | None = None) -> Trial:
        """Run `section`; with `bar` the cases end at one that is far below."""
        return run_section(self._sampler, section, self._cases, self._full, bar)

    def _scheduled(self) -> Ladder:
        num_steps = self._sampler.num_steps
        errors = reuse_errors(self._trajectories, num_steps)
        probes = probe_steps(num_steps)
        measured = {}
        with self._progress.stage("probe", len(probes)) as advance:
            for probe in probes:
                trial = self.trial(listed(num_steps, [n for n in range(num_steps) if n != probe]))
                measured[probe] = float(np.mean([
                    np.square(ours - full).mean()
                    for ours, full in zip(trial.clips, self._full, strict=True)
                ]))  # fmt: skip
                advance(1)
        return schedules(num_steps, cheapest_schedules(errors, weights_of(measured, errors)))

    def _climb(self, family: Ladder, bar: Bar) -> Found:
        low, high, best, count = 0, len(family.rungs) - 1, None, 0
        while low <= high:
            middle = (low + high) // 2
            tried = self.trial(family.rungs[middle], bar)
            count += 1
            if bar.holds(tried.values(bar.metric), margin=True):
                if best is None or tried.report.skip_rate > best.report.skip_rate:
                    best = tried
                low = middle + 1
            else:
                high = middle - 1
        if best is not None and not best.report.hits.any():
            best = None
        return Found(family.name, best, count)


def run_section(
    sampler: Sampler, section: CacheSection, cases: Sequence[Case], full: Sequence[Frames],
    bar: Bar | None = None,
) -> Trial:  # fmt: skip
    """Generate `cases` under `section` and compare with `full`.

    Raises:
        InputError: the cache was never consulted.
    """
    clips: list[Frames] = []
    with apply_cache(sampler.denoisers, section, scheduler=sampler.pipe.scheduler) as cached:
        for case, reference in zip(cases, full, strict=True):
            clips.append(sampler.sample(case))
            if bar is not None and bar.is_far(METRICS[bar.metric](reference, clips[-1])):
                break
        with warnings.catch_warnings():
            # A search passes by sections that reuse nothing.
            warnings.simplefilter("ignore")
            report = cached.report()
    pairs = list(zip(full, clips, strict=False))
    return Trial(
        section=section, clips=tuple(clips), report=report,
        psnr_db=tuple(psnr_db(a, b) for a, b in pairs), ssim=tuple(ssim(a, b) for a, b in pairs),
    )  # fmt: skip
