"""What `--cache` asks for: the section of a plan, or a search in the pipeline of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vcompress.compress.context import CacheRequest
from vcompress.models.recording import record_calls
from vcompress.models.reference.catalog import REFERENCE_PIPELINES
from vcompress.models.video import VideoModel
from vcompress.pipeline.cache_sampler import make_cases, open_sampler, read_prompts
from vcompress.pipeline.cache_search import Bar, Search, run_section
from vcompress.pipeline.run import AUTO, Options, Progress
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan

__all__ = ["cache_request", "with_calls"]

_NUM_CLIPS = 4
# Of each clip; neighbouring steps say the same.
_RECORDED_STEPS = 8
_TRANSFORMER = "transformer"
_REFERENCE = "reference:"

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
    pipeline = _pipeline_of(source)
    if least is None or pipeline is None:
        message = (
            "--cache auto compares generated clips: it needs --min-psnr (30, for instance), and a "
            "MODEL that is a pipeline folder of diffusers or the transformer in one"
        )
        raise InputError(message)
    name, bar = _name_in(source), Bar("psnr_db", least)
    return lambda module: _searched(pipeline, name, module, bar, options, progress)


def with_calls(
    source: str | VideoModel, options: Options, path: Path, progress: Progress
) -> Options:
    """`options` with calls for calibration, recorded to `path`.

    That is done where a cache is searched without any, and for a reference pipeline, whose prompts
    are what `--calib` names.
    """
    pipeline = _pipeline_of(source)
    own = pipeline is not None and pipeline == options.calib
    if pipeline is None or not (own or (options.cache == AUTO and options.calib is None)):
        return options
    sampler = open_sampler(pipeline)
    prompts = read_prompts(options.prompts, sampler)
    calibration, held_out = make_cases(prompts, _NUM_CLIPS, options.seed)
    denoiser = getattr(sampler.pipe, _name_in(source))
    every = max(1, sampler.num_steps // _RECORDED_STEPS)
    with (
        progress.stage("record calls", 2 * _NUM_CLIPS) as advance,
        record_calls(denoiser, path, every_nth_step=every),
    ):
        for case in (*calibration, *held_out):
            sampler.sample(case)
            advance(1)
    return replace(options, calib=str(path))


def _name_in(source: str | VideoModel) -> str:
    given = Path(str(source))
    whole = str(source).startswith(_REFERENCE) or (given / "model_index.json").is_file()
    return _TRANSFORMER if whole else given.name


def _searched(
    pipeline: str, name: str, module: nn.Module, bar: Bar, options: Options, progress: Progress
) -> Answer:
    """The best cache of `module` in its pipeline; clips are compared with the full model's.

    So the target is one for what is quantized and what is reused together.
    """
    sampler = open_sampler(pipeline)
    prompts = read_prompts(options.prompts, sampler)
    if sampler.cannot_pay is not None:
        progress.warn(sampler.cannot_pay)
        return None, {"reason": sampler.cannot_pay}
    calibration, held_out = make_cases(prompts, _NUM_CLIPS, options.seed)
    search = Search(sampler, calibration, progress)
    full = [sampler.sample(case) for case in held_out]
    # What a reused step does is measured before what is quantized adds to it.
    search.ladders()
    setattr(sampler.pipe, name, module)
    best = search.run(bar)[0].best
    if best is None:
        why = (
            f"with the quantized layers no cache holds PSNR {bar.least:g} dB; nothing is cached: "
            "ask for less, or give the layers more bits"
        )
        progress.warn(why)
        return None, {"reason": why}
    trial = run_section(sampler, best.section, held_out, full)
    reached = float(np.mean(trial.psnr_db))
    if reached < bar.least:
        progress.warn(
            f"the cache holds PSNR {bar.least:g} dB on the clips that it was found on, but reaches "
            f"{reached:.2f} dB on others; ask for more, or give more prompts"
        )
    return best.section, {
        "bar": {bar.metric: bar.least}, "calibration": best.as_dict(), "held_out": trial.as_dict()
    }  # fmt: skip


def _pipeline_of(source: str | VideoModel) -> str | None:
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
