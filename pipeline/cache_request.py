"""What `--cache` asks for: the section of a plan, or a search in the pipeline of the denoiser."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vcompress.compress.context import CacheRequest
from vcompress.models.recording import record_calls
from vcompress.models.reference.catalog import REFERENCE_PIPELINES
from vcompress.models.video import VideoModel
from vcompress.pipeline.cache import CacheFound
from vcompress.pipeline.cache_sampler import (
    Case,
    Sampler,
    make_cases,
    make_more,
    open_sampler,
    read_prompts,
)
from vcompress.pipeline.cache_search import Bar, Found, Search, Trial, run_section
from vcompress.pipeline.run import AUTO, Advance, Options, Progress
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.frames import Frames, psnr_db

__all__ = ["NUM_CLIPS", "JointSearch", "cache_request", "name_in", "pipeline_of", "with_calls"]

NUM_CLIPS = 4
# Of each clip; neighbouring steps say the same.
_RECORDED_STEPS = 8
_TRANSFORMER = "transformer"
_REFERENCE = "reference:"
# Targets that lose least; another one is told of the first.
_MOST_EXACT = ("int8", "mxfp8", "mixed")
# What a cache needs to lose below what is reached without one, to be worth a search.
_ROOM_DB = 3.0

Answer = tuple[CacheSection | None, Mapping[str, Any]]


def cache_request(
    source: str | VideoModel, model: VideoModel, options: Options, progress: Progress
) -> CacheRequest | None:
    """How the cache of `model` is found; None if there is to be none.

    Raises:
        InputError: the model is no denoiser, or the plan, the pipeline or the target is missing.
    """
    if options.cache is None:
        return None
    if model.task != "denoise":
        message = f"--cache is for denoisers; the task of {model.name} is {model.task}"
        raise InputError(message)
    if options.cache != AUTO:
        section = _section_of(Path(options.cache))
        return lambda _module: (section, {"plan": options.cache})
    least = options.min_psnr
    pipeline = pipeline_of(source)
    if least is None or pipeline is None:
        message = (
            "--cache auto compares generated clips: it needs --min-psnr (30, for instance), and a "
            "MODEL that is a pipeline folder of diffusers or the transformer in one"
        )
        raise InputError(message)
    return JointSearch(pipeline, name_in(source), Bar("psnr_db", least), options, progress)


def with_calls(
    source: str | VideoModel, options: Options, path: Path, progress: Progress
) -> Options:
    """`options` with calls for calibration, recorded to `path`.

    That is done where clips are generated in any case and no calls are given, and for a reference
    pipeline, whose prompts are what `--calib` names.
    """
    pipeline = pipeline_of(source)
    own = pipeline is not None and pipeline == options.calib
    searches = options.cache == AUTO or options.dynamic_precision
    if options.prompts is not None and not (own or searches):
        message = (
            "--prompts are what --cache auto and --dynamic-precision generate clips of: add one of "
            "them"
        )
        raise InputError(message)
    if pipeline is None or not (own or (searches and options.calib is None)):
        return options
    sampler = open_sampler(pipeline)
    prompts = read_prompts(options.prompts, sampler)
    # Prompts that a cache is judged on are not among them.
    cases, _ = make_cases(prompts, 2 * NUM_CLIPS, options.seed)
    denoiser = getattr(sampler.pipe, name_in(source))
    every = max(1, sampler.num_steps // _RECORDED_STEPS)
    with (
        progress.stage("record calls", len(cases)) as advance,
        record_calls(denoiser, path, every_nth_step=every),
    ):
        for case in cases:
            sampler.sample(case)
            advance(1)
    return replace(options, calib=str(path))


def name_in(source: str | VideoModel) -> str:
    """Which denoiser of its pipeline `source` is."""
    given = Path(str(source))
    whole = str(source).startswith(_REFERENCE) or (given / "model_index.json").is_file()
    return _TRANSFORMER if whole else given.name


class JointSearch:
    """Finds the cache of a denoiser in its pipeline, with what is quantized in place.

    Clips are compared with the full model's, so that the target is one for what is quantized and
    what is reused together.

    Attributes:
        found: what was found, once it was called; None where caching cannot pay or nothing holds.
    """

    def __init__(
        self, pipeline: str, name: str, bar: Bar, options: Options, progress: Progress
    ) -> None:
        """For the denoiser `name` of `pipeline`."""
        self._pipeline, self._name, self._bar = pipeline, name, bar
        self._options, self._progress = options, progress
        self.found: CacheFound | None = None

    def __call__(self, module: nn.Module) -> Answer:
        """The best cache of `module`, and how well it holds on other clips."""
        progress, bar, options = self._progress, self._bar, self._options
        sampler = open_sampler(self._pipeline)
        prompts = read_prompts(options.prompts, sampler)
        if sampler.cannot_pay is not None:
            progress.warn(sampler.cannot_pay)
            return None, {"reason": sampler.cannot_pay}
        calibration, held_out = make_cases(prompts, NUM_CLIPS, options.seed)
        more = make_more(prompts, 2 * NUM_CLIPS, options.seed)
        search = Search(sampler, calibration, progress, confirm=more)
        full = [sampler.sample(case) for case in held_out]
        original = getattr(sampler.pipe, self._name)
        setattr(sampler.pipe, self._name, module)
        without = search.alone()
        families: list[Found] = []
        if bar.holds(without):
            # What a reused step does is measured without what the quantized layers add to it.
            setattr(sampler.pipe, self._name, original)
            search.ladders()
            setattr(sampler.pipe, self._name, module)
            families = search.run(bar)
        best = families[0].best if families else None
        with progress.stage("hold out", 2 * len(held_out)) as advance:
            judged = _judge(
                sampler, None if best is None else best.section, held_out, full, advance
            )
        alone = {"psnr_db": list(judged.alone)}
        if best is None or judged.trial is None:
            why = _nothing_holds(without, bar.least, options)
            progress.warn(why)
            return None, {"reason": why, "held_out": alone, "precision_alone": alone}
        reached = float(np.mean(judged.trial.psnr_db))
        if reached < bar.least:
            progress.warn(
                f"the cache holds PSNR {bar.least:g} dB on the clips that it was found on, but "
                f"reaches {reached:.2f} dB on others; ask for more, or give more prompts"
            )
        self.found = CacheFound(
            name=sampler.name, num_steps=sampler.num_steps, bar=bar, section=best.section,
            reason=f"{reached:.4g} dB on {len(held_out)} held-out clips, {bar.least:g} asked",
            calibration=best, held_out=judged.trial, speed=judged.speed, alone=judged.alone,
            families=tuple(families), cases=tuple(held_out), full=tuple(full),
        )  # fmt: skip
        return best.section, {
            "bar": {bar.metric: bar.least}, "calibration": best.as_dict(),
            "held_out": judged.trial.as_dict(), "precision_alone": alone,
            "speed_up": list(judged.speed),
        }  # fmt: skip


def _nothing_holds(alone: Sequence[float], least: float, options: Options) -> str:
    """How far what is quantized is from the target by itself, and what to do about it."""
    reached = float(np.mean(alone))
    said = (
        f"precision alone, with every step computed, is at {reached:.1f} dB "
        f"({min(alone):.1f} to {max(alone):.1f} on {len(alone)} clips)"
    )
    if reached < least:
        outcome = f"{said}, below the {least:g} dB that are asked for: no cache was searched"
    else:
        outcome = (
            f"no cache holds {least:g} dB with the quantized layers: {said}, which leaves "
            f"{reached - least:.1f} dB to lose by what is reused"
        )
    error = f"--max-layer-error {options.max_layer_error / 4:g} (now {options.max_layer_error:g})"
    other = "" if options.target in _MOST_EXACT else f" or --target {_MOST_EXACT[0]}"
    below = math.floor(min(reached, least) - _ROOM_DB)
    return (
        f"{outcome}; nothing is cached: give the layers more bits, by {error}{other}, or ask for "
        f"less: --min-psnr {below}"
    )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """On held-out clips: PSNR of what is quantized, the cache added, and its speed-up."""

    alone: tuple[float, ...]
    trial: Trial | None
    speed: tuple[float, ...]


def _judge(
    sampler: Sampler, section: CacheSection | None, cases: list[Case], full: list[Frames],
    advance: Advance,
) -> _Judged:  # fmt: skip
    """Each clip without the cache and with it, one after the other."""
    alone, speed, trials = [], [], []
    for case, reference in zip(cases, full, strict=True):
        started = time.perf_counter()
        alone.append(psnr_db(reference, sampler.sample(case)))
        between = time.perf_counter()
        advance(1)
        if section is not None:
            trials.append(run_section(sampler, section, [case], [reference]))
            speed.append((between - started) / (time.perf_counter() - between))
        advance(1)
    trial = Trial.together(trials) if trials else None
    return _Judged(alone=tuple(alone), trial=trial, speed=tuple(speed))


def pipeline_of(source: str | VideoModel) -> str | None:
    """The pipeline that `source` is or is part of, if there is one."""
    if not isinstance(source, str):
        return None
    if source.removeprefix(_REFERENCE) in REFERENCE_PIPELINES and source.startswith(_REFERENCE):
        return source
    for folder in (Path(source), Path(source).absolute().parent):
        if (folder / "model_index.json").is_file():
            return str(folder)
    return None


def _section_of(path: Path) -> CacheSection:
    if not path.is_file():
        message = f"--cache must be {AUTO!r} or a plan made by vcompress cache; no file {path}"
        raise InputError(message)
    section = CompressionPlan.load(path).cache
    if section is None:
        message = f"{path}: this plan has no section cache; make one with vcompress cache"
        raise InputError(message)
    return section
