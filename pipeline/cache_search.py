"""Find the cache policy and its settings for a quality target, on generated clips.

Every family of `compress.cache.ladder` is a ladder from exact to fast. The last rung that holds the
target on the calibration clips is found by bisection; of all families the one that skips most
wins. Quality is that of whole generated clips against the full model's from the same noise, so
errors that a sampler heals are not counted, and errors that it amplifies are.

What holds on calibration clips has to hold on others. Whatever is fitted is judged on clips of
prompts that it was not fitted to (see `Ladder.refits`), and a rung holds only if the mean over the
clips less its uncertainty does: by Student's distribution the mean over all clips then lies above
the target nine times in ten. The best of many rungs on a few clips is also the luckiest one, so it
is run once more on clips that the search has not seen; where it fails there, the next more exact
rung is tried, and the family that then skips most wins.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vcompress.compress.cache import CacheReport, Trajectory, apply_cache, observe
from vcompress.compress.cache.ladder import Ladder, Probe, ladders, listed, schedules
from vcompress.compress.cache.schedule import Runs, probe_steps
from vcompress.pipeline.cache_sampler import Case, Sampler
from vcompress.pipeline.run import Progress
from vcompress.spec.cache_section import CacheSection
from vcompress.validate.frames import Frames, psnr_db, ssim

__all__ = ["METRICS", "Bar", "Found", "Search", "Trial", "lower_bound", "run_section"]

METRICS: dict[str, Callable[[Frames, Frames], float]] = {"psnr_db": psnr_db, "ssim": ssim}
# A clip alone that is so far below ends a trial early.
_FAR = {"psnr_db": 8.0, "ssim": 0.2}
_TINY = 1e-14
# Nine tenths of Student's distribution, by number of clips less one.
_STUDENT = (3.08, 1.89, 1.64, 1.53, 1.48, 1.44, 1.41, 1.40, 1.38, 1.37)


@dataclass(frozen=True)
class Bar:
    """A quality target: the mean of `metric` over clips is at least `least`."""

    metric: str
    least: float

    def holds(self, values: Sequence[float], *, margin: bool = False) -> bool:
        """Whether `values` of clips reach it, with a margin for what others may have if asked."""
        return (lower_bound(values) if margin else float(np.mean(values))) >= self.least

    def is_far(self, value: float) -> bool:
        """Whether one clip says enough."""
        return value < self.least - _FAR[self.metric]


def lower_bound(values: Sequence[float]) -> float:
    """What the mean over all clips exceeds nine times in ten, judged by `values` of some."""
    mean, more = float(np.mean(values)), len(values) - 1
    if more < 1:
        return mean
    factor = _STUDENT[min(more, len(_STUDENT)) - 1]
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - factor * error


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One section, run on clips; in a search each clip has it fitted to the others."""

    section: CacheSection
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    report: CacheReport
    clips: tuple[Frames, ...] = field(repr=False)

    @classmethod
    def together(cls, trials: Sequence[Trial]) -> Trial:
        """Trials of one section, a clip or more each, as one."""
        return cls(
            section=trials[0].section,
            psnr_db=tuple(value for one in trials for value in one.psnr_db),
            ssim=tuple(value for one in trials for value in one.ssim),
            clips=tuple(clip for one in trials for clip in one.clips),
            report=CacheReport.together([one.report for one in trials]),
        )

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

    def __init__(
        self, sampler: Sampler, cases: Sequence[Case], progress: Progress, *,
        confirm: Sequence[Case] = (),
    ) -> None:  # fmt: skip
        """Generate `cases` with everything computed, and observe; and those to `confirm` on."""
        self._sampler, self._cases, self._progress = sampler, cases, progress
        self._confirm = confirm
        with progress.stage("full model", len(cases) + len(confirm)) as advance:
            with observe(sampler.denoisers) as trajectories:
                self._full = [self._sampled(case, advance) for case in cases]
            self._confirm_full = [self._sampled(case, advance) for case in confirm]
        self._trajectories: list[Trajectory] = trajectories
        self._ladders: list[Ladder] = []

    def _sampled(self, case: Case, advance: Callable[[int], None]) -> Frames:
        clip = self._sampler.sample(case)
        advance(1)
        return clip

    @property
    def full(self) -> list[Frames]:
        """The clips of the full model."""
        return self._full

    def alone(self) -> tuple[float, ...]:
        """PSNR by clip of the pipeline as it is now, every step computed."""
        with self._progress.stage("precision alone", len(self._cases)) as advance:
            return tuple(
                psnr_db(full, self._sampled(case, advance))
                for full, case in zip(self._full, self._cases, strict=True)
            )

    def ladders(self) -> list[Ladder]:
        """What there is to try; the first call probes what a reused step does to the clips."""
        if not self._ladders:
            folds = self._folds()
            families = ladders(self._sampler.num_steps, self._trajectories, folds)
            self._ladders = [self._scheduled(folds), *families]
        return self._ladders

    def run(self, bar: Bar, families: Sequence[Ladder] | None = None) -> list[Found]:
        """The best of every family under `bar`, the one that skips most first.

        A family is left as soon as what remains of it skips less than the best one before.
        """
        families = self.ladders() if families is None else families
        found: list[Found] = []
        with self._progress.stage("search", len(families)) as advance:
            for family in families:
                most = max(map(_skip_rate, found), default=0.0)
                found.append(self._climb(family, bar, most))
                advance(1)
        found.sort(key=_skip_rate, reverse=True)
        if not self._confirm:
            return found
        return self._confirmed(found, {family.name: family.rungs for family in families}, bar)

    def _confirmed(
        self, found: Sequence[Found], rungs: Mapping[str, Sequence[CacheSection]], bar: Bar
    ) -> list[Found]:
        """`found` with that first which skips most and holds on the other clips, too."""
        at = {
            one.name: rungs[one.name].index(one.best.section)
            for one in found
            if one.best is not None
        }
        # What a rung can skip at most, until it is tried: what the one above it skips.
        most = {one.name: _skip_rate(one) for one in found if one.name in at}
        winner: Found | None = None
        with self._progress.stage("confirm") as advance:
            while at:
                name = max(at, key=lambda each: most[each])
                if winner is not None and most[name] <= _skip_rate(winner):
                    break
                tried = run_section(
                    self._sampler, rungs[name][at[name]], self._confirm, self._confirm_full, bar=bar
                )
                advance(1)
                most[name] = min(most[name], tried.report.skip_rate)
                if self._holds(tried, bar):
                    count = next(one.num_trials for one in found if one.name == name)
                    if winner is None or tried.report.skip_rate > _skip_rate(winner):
                        winner = Found(name, tried, count)
                    del at[name]
                elif at[name]:
                    at[name] -= 1
                else:
                    del at[name]
        if winner is None:
            return [replace(one, best=None) for one in found]
        return [winner, *(one for one in found if one.name != winner.name)]

    def _holds(self, tried: Trial, bar: Bar) -> bool:
        """On all clips to confirm on, with a margin."""
        is_whole = len(tried.clips) == len(self._confirm)
        is_cache = bool(tried.report.hits.any())
        return is_whole and is_cache and bar.holds(tried.values(bar.metric), margin=True)

    def trial(
        self, section: CacheSection, bar: Bar | None = None,
        refit: Sequence[CacheSection] | None = None,
    ) -> Trial:  # fmt: skip
        """Run `section`, or by clip those of `refit`; with `bar` it ends at a clip far below."""
        return run_section(self._sampler, section, self._cases, self._full, bar=bar, refit=refit)

    def _folds(self) -> list[list[int]]:
        """Of each clip, the generations with its prompt; the first is number 1."""
        prompts = [case.prompt for case in self._cases]
        return [
            [at for at, other in enumerate(prompts, 1) if other is prompt or _equal(other, prompt)]
            for prompt in prompts
        ]

    def _scheduled(self, folds: list[list[int]]) -> Ladder:
        """Schedules, once the weight of the steps is measured: one step and one clip a run."""
        num_steps = self._sampler.num_steps
        runs = Runs.of(self._trajectories, num_steps)
        steps = probe_steps(num_steps, runs.starts)
        probes = []
        with self._progress.stage("probe", len(steps)) as advance:
            for count, step in enumerate(steps):
                at = count % len(self._cases)
                others = [each for each in range(num_steps) if each != step]
                mixture = runs.mixture_of(others)
                trial = run_section(
                    self._sampler, listed(num_steps, others, mixture, runs.starts),
                    [self._cases[at]], [self._full[at]],
                )  # fmt: skip
                squared = float(np.square(trial.clips[0] - self._full[at]).mean())
                probes.append(Probe(at + 1, step, squared / max(runs.error(step, at + 1), _TINY)))
                advance(1)
        return schedules(runs, probes, folds)

    def _climb(self, family: Ladder, bar: Bar, least_skip: float = 0.0) -> Found:
        low, high, best, count = 0, len(family.rungs) - 1, None, 0
        while low <= high:
            middle = (low + high) // 2
            refit = family.refit(middle, len(self._cases))
            tried = self.trial(family.rungs[middle], bar, refit)
            count += 1
            is_whole = len(tried.clips) == len(self._cases)
            if is_whole and bar.holds(tried.values(bar.metric), margin=True):
                if best is None or tried.report.skip_rate > best.report.skip_rate:
                    best = tried
                low = middle + 1
            else:
                high = middle - 1
                if tried.report.skip_rate < least_skip:
                    break
        if best is not None and not best.report.hits.any():
            best = None
        return Found(family.name, best, count)


def _equal(first: Any, second: Any) -> bool:
    """Whether two prompts are; those of embeddings are told apart as objects."""
    return isinstance(first, str) and first == second


def run_section(
    sampler: Sampler, section: CacheSection, cases: Sequence[Case], full: Sequence[Frames], *,
    bar: Bar | None = None, refit: Sequence[CacheSection] | None = None,
) -> Trial:  # fmt: skip
    """Generate `cases` under `section`, or each under its own of `refit`; compare with `full`.

    Raises:
        InputError: the cache was never consulted.
    """
    clips: list[Frames] = []
    reports = []
    sections = [section] * len(cases) if refit is None else refit
    for own, case, reference in zip(sections, cases, full, strict=True):
        with (
            apply_cache(sampler.denoisers, own, scheduler=sampler.pipe.scheduler) as cached,
            warnings.catch_warnings(),
        ):
            # A search passes by sections that reuse nothing.
            warnings.simplefilter("ignore")
            clips.append(sampler.sample(case))
            reports.append(cached.report())
        if bar is not None and bar.is_far(METRICS[bar.metric](reference, clips[-1])):
            break
    pairs = list(zip(full, clips, strict=False))
    return Trial(
        section=section, clips=tuple(clips), report=CacheReport.together(reports),
        psnr_db=tuple(psnr_db(a, b) for a, b in pairs), ssim=tuple(ssim(a, b) for a, b in pairs),
    )  # fmt: skip
