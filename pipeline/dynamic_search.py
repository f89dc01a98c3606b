"""Decide which inputs of a denoiser have four bits, block by block and step by step.

Three families give a share of the block calls four bits: "volatility" by a predicted error (see
`compress.dynamic`), "steps" all blocks in a fixed range of steps, "blocks" some blocks in all
steps. Of each, the largest share whose generated clips hold the target is found by bisection. The
family with the largest share wins; a fixed one wins a tie, so that what changes with the data has
to be worth it.

An end of the run is protected if it is worth more than others: a tenth of the steps with fine
inputs there, and four bits everywhere else, has to save more than twice a tenth of the squared
error that fine inputs save in all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from vcompress.compress.dynamic import DynamicSection, ErrorLine, PrecisionReport, apply_dynamic
from vcompress.compress.dynamic.calibrate import (
    Point,
    blocks_that_change,
    fit,
    held_weights,
    measure_blocks,
    section_of,
)
from vcompress.pipeline.cache_sampler import Case, Sampler
from vcompress.pipeline.cache_search import Bar
from vcompress.pipeline.run import Progress
from vcompress.spec.dynamic_section import FINE_INPUTS, Signal
from vcompress.validate.frames import Frames, psnr_db

__all__ = [
    "FAMILIES",
    "DynamicSearch",
    "PrecisionTrial",
    "Protection",
    "best_signal",
    "correlations",
    "uniform",
]

FAMILIES = ("steps", "blocks", "volatility")
_SHARES = tuple(eighth / 8 for eighth in range(1, 8))
_MEASURED_RUNS = 2
_PROBED = 0.1
_WORTH = 2.0


@dataclass(frozen=True, kw_only=True)
class PrecisionTrial:
    """One section on clips, against those of the full model."""

    section: DynamicSection
    psnr_db: tuple[float, ...]
    report: PrecisionReport
    clips: tuple[Frames, ...] = field(repr=False)

    @property
    def squared_error(self) -> float:
        """The mean over clips, of values in 0..1."""
        return float(np.mean([10 ** (-value / 10) for value in self.psnr_db]))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "psnr_db": list(self.psnr_db), "share": self.report.share,
            "linear_share": self.report.linear_share, "mean_bits": self.report.mean_bits,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What fine inputs at either end of a run are worth, as shares of what they are everywhere.

    Attributes:
        num_steps: of the run.
        first, last: of the first and last tenth of the steps.
    """

    num_steps: int
    first: float
    last: float

    @property
    def width(self) -> int:
        """A tenth of the steps."""
        return max(1, round(_PROBED * self.num_steps))

    @property
    def protect(self) -> tuple[int, int]:
        """So many steps at either end have fine inputs in any case."""
        return tuple(self.width if worth > _WORTH * _PROBED else 0 for worth in self._worth)  # type: ignore[return-value]

    @property
    def _worth(self) -> tuple[float, float]:
        return self.first, self.last

    def split(self, share: float) -> tuple[int, int]:
        """The fine steps at either end of a fixed schedule that leaves `share` four bits."""
        count = round((1 - share) * self.num_steps)
        first, last = (max(0.0, worth) for worth in self._worth)
        part = first / (first + last) if first + last > 0 else 0.5
        return round(part * count), count - round(part * count)


def best_signal(points: Sequence[Point]) -> tuple[Signal, float]:
    """The signal whose lines explain more of the error, and how much of its variance they do."""
    explained: dict[Signal, float] = {}
    names: tuple[Signal, ...] = ("added", "moved")
    for name in names:
        lines = fit(points, name)
        rest = total = 0.0
        for block, line in lines.items():
            errors = np.array([p.error for p in points if p.block == block and p.added is not None])
            # A run of one step has none.
            deviation = float(errors.var() * len(errors)) if len(errors) else 0.0
            correlation = 0.0 if np.isnan(line.correlation) else line.correlation
            total += deviation
            rest += deviation * (1 - correlation**2)
        explained[name] = 1 - rest / total if total else 0.0
    best = max(names, key=lambda name: explained[name])
    return best, explained[best]


def correlations(points: Sequence[Point], signal: Signal) -> dict[str, float | None]:
    """Of the signal and the error, by block; None where one of them never changes."""
    found = {name: line.correlation for name, line in fit(points, signal).items()}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def uniform(
    blocks: Sequence[str], *, four_bits: bool, num_steps: int, protect: tuple[int, int] = (0, 0),
    fine: str = FINE_INPUTS[0],
) -> DynamicSection:  # fmt: skip
    """All blocks with inputs of four bits in all steps but those to protect, or in none."""
    first, last = protect
    return DynamicSection(
        signal="none", threshold=1.0 if four_bits else -1.0, num_steps=num_steps, fine=fine,
        blocks={name: ErrorLine(alpha=0.0, beta=0.0) for name in blocks},
        protect_first=first, protect_last=last,
    )  # fmt: skip


class DynamicSearch:
    """Runs the full model once, then the planned one under any number of sections.

    Attributes:
        full: clips of the full model.
        points: what was measured of the blocks.
    """

    def __init__(
        self, sampler: Sampler, name: str, cases: Sequence[Case], progress: Progress
    ) -> None:
        """For the denoiser `name` of the pipeline, of which `sampler` holds the full one now."""
        self._sampler, self._name, self._cases, self._progress = sampler, name, cases, progress
        self.points: list[Point] = []
        with progress.stage("full model", len(cases)) as advance:
            self.full = [_sampled(sampler, case, advance) for case in cases]
        self._module: nn.Module | None = None

    def use(self, module: nn.Module) -> None:
        """Put the planned `module` into the pipeline."""
        setattr(self._sampler.pipe, self._name, module)
        self._module = module

    @property
    def _planned(self) -> nn.Module:
        assert self._module is not None
        return self._module

    def measure(self) -> None:
        """Measure the blocks on a few of the clips."""
        cases = self._cases[:_MEASURED_RUNS]
        with (
            self._progress.stage("measure blocks", len(cases)) as advance,
            measure_blocks(
                self._planned, num_steps=self._sampler.num_steps, fine=FINE_INPUTS[0]
            ) as points,
        ):
            for case in cases:
                _sampled(self._sampler, case, advance)
        self.points = points

    def trial(
        self, section: DynamicSection, bar: Bar | None = None, *, limit: int | None = None
    ) -> PrecisionTrial:
        """The clips under `section`; with `bar` it ends at a clip far below."""
        pairs = list(zip(self._cases, self.full, strict=True))[:limit]
        return run_dynamic(self._sampler, self._planned, section, pairs, bar=bar)

    def uniform(self, *, four_bits: bool, protect: tuple[int, int] = (0, 0)) -> DynamicSection:
        """The same inputs in all blocks that can change; see `uniform`."""
        return uniform(
            blocks_that_change(self._planned), four_bits=four_bits, protect=protect,
            num_steps=self._sampler.num_steps,
        )  # fmt: skip

    def probe(self, fine: PrecisionTrial, four: PrecisionTrial) -> Protection:
        """What fine inputs at either end are worth."""
        num_steps = self._sampler.num_steps
        width = max(1, round(_PROBED * num_steps))
        saved = four.squared_error - fine.squared_error
        worth = []
        with self._progress.stage("probe the ends", 2) as advance:
            for protect in ((width, 0), (0, width)):
                tried = self.trial(self.uniform(four_bits=True, protect=protect))
                worth.append((four.squared_error - tried.squared_error) / saved if saved > 0 else 0)
                advance(1)
        return Protection(num_steps=num_steps, first=worth[0], last=worth[1])

    def section(self, family: str, share: float, ends: Protection) -> DynamicSection:
        """The section of `family` that gives four bits to about `share` of the block calls."""
        if family == "steps":
            return self.uniform(four_bits=True, protect=ends.split(share))
        signal = best_signal(self.points)[0] if family == "volatility" else "none"
        return section_of(
            self.points, signal, share, num_steps=self._sampler.num_steps, fine=FINE_INPUTS[0],
            protect=ends.protect,
        )  # fmt: skip

    def run(self, bar: Bar, ends: Protection) -> dict[str, PrecisionTrial | None]:
        """Of every family the largest share that holds `bar`, with a margin for other clips."""
        found: dict[str, PrecisionTrial | None] = {}
        with self._progress.stage("search", len(FAMILIES)) as advance:
            for family in FAMILIES:
                found[family] = self._climb(family, bar, ends)
                advance(1)
        return found

    def _climb(self, family: str, bar: Bar, ends: Protection) -> PrecisionTrial | None:
        low, high, best = 0, len(_SHARES) - 1, None
        while low <= high:
            middle = (low + high) // 2
            tried = self.trial(self.section(family, _SHARES[middle], ends), bar)
            is_whole = len(tried.psnr_db) == len(self._cases)
            if is_whole and tried.report.share and bar.holds(tried.psnr_db, margin=True):
                best, low = tried, middle + 1
            else:
                high = middle - 1
        return best


def run_dynamic(
    sampler: Sampler, module: nn.Module, section: DynamicSection,
    pairs: Sequence[tuple[Case, Frames]], *, bar: Bar | None = None,
) -> PrecisionTrial:  # fmt: skip
    """Generate cases under `section`, and compare with the clips of the full model beside them."""
    clips: list[Frames] = []
    values: list[float] = []
    with held_weights(module), apply_dynamic(module, section) as handle:
        for case, reference in pairs:
            clips.append(sampler.sample(case))
            values.append(psnr_db(reference, clips[-1]))
            if bar is not None and bar.is_far(values[-1]):
                break
    return PrecisionTrial(
        section=section, psnr_db=tuple(values), clips=tuple(clips), report=handle.counted()
    )


def _sampled(sampler: Sampler, case: Case, advance: Callable[[int], None]) -> Frames:
    clip = sampler.sample(case)
    advance(1)
    return clip
