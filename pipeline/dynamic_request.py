"""What `--dynamic-precision` asks for: a decision in the pipeline of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vcompress.compress.dynamic.calibrate import blocks_that_change, held_weights
from vcompress.models.video import VideoModel
from vcompress.pipeline.cache_request import NUM_CLIPS, name_in, pipeline_of
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, open_sampler, read_prompts
from vcompress.pipeline.cache_search import Bar
from vcompress.pipeline.dynamic_search import (
    DynamicSearch,
    PrecisionTrial,
    Protection,
    best_signal,
    correlations,
    run_dynamic,
)
from vcompress.pipeline.run import AUTO, Options, Progress
from vcompress.spec.dynamic_section import DynamicSection
from vcompress.spec.errors import InputError
from vcompress.validate.frames import Frames, psnr_db

__all__ = ["DynamicFound", "DynamicPlanner", "dynamic_request"]

# Twice the error is 3 dB: half for precision, half for a cache that is searched after it.
_ROOM_DB = 3.0

Answer = tuple[DynamicSection | None, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DynamicFound:
    """What was found.

    Attributes:
        name: of the pipeline.
        bar: the target.
        family: that won, see `dynamic_search`.
        trial: its section on held-out clips.
        evidence: everything that was measured, as plain data.
        cases, full: the held-out clips.
    """

    name: str
    bar: Bar
    family: str
    trial: PrecisionTrial
    evidence: Mapping[str, Any]
    cases: tuple[Case, ...]
    full: tuple[Frames, ...]

    @property
    def holds(self) -> bool:
        """Whether the target holds on held-out clips."""
        return self.bar.holds(self.trial.psnr_db)


def dynamic_request(
    source: str | VideoModel, model: VideoModel, options: Options, progress: Progress
) -> DynamicPlanner | None:
    """How the dynamic precision of `model` is found; None if there is to be none.

    Raises:
        InputError: the model is no denoiser, or the pipeline or the target is missing.
    """
    if not options.dynamic_precision:
        return None
    if model.task != "denoise":
        message = f"--dynamic-precision is for denoisers; the task of {model.name} is {model.task}"
        raise InputError(message)
    pipeline = pipeline_of(source)
    if options.min_psnr is None or pipeline is None:
        message = (
            "--dynamic-precision compares generated clips: it needs --min-psnr (30, for instance), "
            "and a MODEL that is a pipeline folder of diffusers or the transformer in one"
        )
        raise InputError(message)
    return DynamicPlanner(pipeline, name_in(source), options.min_psnr, options, progress)


class DynamicPlanner:
    """Decides with what is quantized in place, on generated clips.

    Attributes:
        found: what was found, once it was called; None where nothing changes.
    """

    def __init__(
        self, pipeline: str, name: str, least: float, options: Options, progress: Progress
    ) -> None:
        """For the denoiser `name` of `pipeline`."""
        self._pipeline, self._name, self._least = pipeline, name, least
        self._options, self._progress = options, progress
        self.found: DynamicFound | None = None

    def __call__(self, module: nn.Module) -> Answer:
        """The section for `module`, and what it rests on."""
        sampler = open_sampler(self._pipeline)
        prompts = read_prompts(self._options.prompts, sampler)
        calibration, held_out = make_cases(prompts, NUM_CLIPS, self._options.seed)
        try:
            blocks_that_change(module)
        except InputError as error:
            pairs = [(case, sampler.sample(case)) for case in held_out]
            setattr(sampler.pipe, self._name, module)
            return self._nothing(str(error), {}, sampler, pairs)
        search = DynamicSearch(sampler, self._name, calibration, self._progress)
        pairs = [(case, sampler.sample(case)) for case in held_out]
        search.use(module)
        room = _ROOM_DB if self._options.cache == AUTO else 0.0
        bar = Bar("psnr_db", self._least + room)
        with held_weights(module):
            return self._decide(search, sampler, module, bar, pairs)

    def _decide(
        self, search: DynamicSearch, sampler: Sampler, module: nn.Module, bar: Bar,
        pairs: list[tuple[Case, Frames]],
    ) -> Answer:  # fmt: skip
        fine = search.trial(search.uniform(four_bits=False))
        four = search.trial(search.uniform(four_bits=True))
        evidence: dict[str, Any] = {
            "bar": {"psnr_db": bar.least}, "fine": fine.as_dict(), "four_bits": four.as_dict(),
        }  # fmt: skip
        at = f"PSNR {bar.least:g} dB" + (
            f" ({self._least:g}, and {_ROOM_DB:g} for the cache)" if bar.least > self._least else ""
        )
        if bar.holds(four.psnr_db, margin=True):
            why = f"inputs of four bits hold {at} in every step, so nothing needs to change"
            return self._nothing(why, evidence, sampler, pairs, warn=False)
        if not bar.holds(fine.psnr_db, margin=True):
            why = (
                f"even with inputs of eight bits in every step the plan does not hold {at} with a "
                f"margin (mean {np.mean(fine.psnr_db):.2f} dB, with four bits "
                f"{np.mean(four.psnr_db):.2f} dB): its weights need more bits, not its inputs"
            )
            return self._nothing(why, evidence, sampler, pairs)
        search.measure()
        ends = search.probe(fine, four)
        families = search.run(bar, ends)
        evidence |= _evidence(search, ends, families)
        name, best = _winner(families)
        if best is None:
            why = f"no share of inputs of four bits holds {at}"
            return self._nothing(why, evidence, sampler, pairs)
        judged = run_dynamic(sampler, module, best.section, pairs)
        static = run_dynamic(sampler, module, search.uniform(four_bits=True), pairs)
        evidence |= {
            "family": name, "held_out": {**judged.as_dict(), "map": judged.report.as_dict()},
            "four_bits_held_out": static.as_dict(),
        }  # fmt: skip
        self._tell(name, judged, static, families)
        cases, full = zip(*pairs, strict=True)
        self.found = DynamicFound(
            name=sampler.name, bar=Bar("psnr_db", self._least), family=name, trial=judged,
            evidence=evidence, cases=cases, full=full,
        )  # fmt: skip
        return best.section, evidence

    def _tell(
        self, name: str, judged: PrecisionTrial, static: PrecisionTrial,
        families: Mapping[str, PrecisionTrial | None],
    ) -> None:  # fmt: skip
        if name != "volatility":
            volatile = families["volatility"]
            share = 0.0 if volatile is None else volatile.report.share
            self._progress.warn(
                f"precision by volatility gives {share:.0%} of the work four bits, a fixed choice "
                f"of {name} {judged.report.share:.0%}: the fixed choice is taken"
            )
        self._progress.warn(
            "dynamic precision runs in torch (compressed); the exported graphs round these inputs "
            f"to four bits in every step, which is at {np.mean(static.psnr_db):.2f} dB on held-out "
            f"clips instead of {np.mean(judged.psnr_db):.2f}"
        )

    def _nothing(
        self, reason: str, evidence: dict[str, Any], sampler: Sampler,
        pairs: Sequence[tuple[Case, Frames]], *, warn: bool = True,
    ) -> Answer:  # fmt: skip
        """No section; the target is then held against the plan as it stands."""
        if warn:
            self._progress.warn(f"no dynamic precision: {reason}")
        psnr = [psnr_db(full, sampler.sample(case)) for case, full in pairs]
        return None, {"reason": reason, **evidence, "held_out": {"psnr_db": psnr}}


def _winner(families: Mapping[str, PrecisionTrial | None]) -> tuple[str, PrecisionTrial | None]:
    """The family with the largest share; of equal ones the first, a fixed one."""
    held = {name: trial for name, trial in families.items() if trial is not None}
    if not held:
        return "", None
    name = max(held, key=lambda each: round(held[each].report.share, 2))
    return name, held[name]


def _evidence(
    search: DynamicSearch, ends: Protection, families: Mapping[str, PrecisionTrial | None]
) -> dict[str, Any]:
    signal, explained = best_signal(search.points)
    return {
        "signal": signal, "explained": explained,
        "correlation": correlations(search.points, signal),
        "worth_of_ends": {"first": ends.first, "last": ends.last, "steps": ends.width},
        "families": {
            name: None if trial is None else trial.as_dict() for name, trial in families.items()
        },
    }  # fmt: skip
