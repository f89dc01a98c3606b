"""`vcompress cache`: from a pipeline and a quality target to a plan with a section `cache`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vcompress
from vcompress.compress.cache import Cached, CacheSection, apply_cache
from vcompress.pipeline.cache_sampler import (
    Case,
    Sampler,
    make_cases,
    make_more,
    open_sampler,
    read_prompts,
)
from vcompress.pipeline.cache_search import Bar, Found, Search, Trial, run_section
from vcompress.pipeline.features import FeatureReader
from vcompress.pipeline.planning import read_plan, save_plan
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec.artifact import MANIFEST, Artifact
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.frames import Frames

__all__ = ["CacheFound", "cached", "find_cache"]


@dataclass(frozen=True, kw_only=True)
class CacheFound:
    """What was found.

    Attributes:
        name: of the pipeline.
        num_steps: of a run.
        bar: the target.
        section: policy and settings; None where caching does not pay.
        reason: why not, or what holds.
        calibration: the chosen section on the clips that it was confirmed on.
        held_out: on others; with `speed` wall clock, full over cached, by clip, interleaved.
        alone: where layers are quantized, PSNR of these without a cache; `speed` is the cache's.
        families: the best of each.
        cases, full: the held-out clips.
        feature_distances: of the held-out clips; None where no recogniser was given.
        path, report: of the plan and the report; None if nothing was written.
    """

    name: str
    num_steps: int
    bar: Bar
    section: CacheSection | None
    reason: str
    calibration: Trial | None = None
    held_out: Trial | None = None
    speed: tuple[float, ...] = ()
    alone: tuple[float, ...] = ()
    families: tuple[Found, ...] = ()
    cases: tuple[Case, ...] = ()
    full: tuple[Frames, ...] = ()
    feature_distances: tuple[float, ...] | None = None
    path: Path | None = None
    report: Path | None = None

    @property
    def holds(self) -> bool:
        """Whether the target holds on held-out clips; true where nothing is cached."""
        if self.held_out is None:
            return True
        return self.bar.holds(self.held_out.values(self.bar.metric))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "pipeline": self.name, "num_steps": self.num_steps,
            "bar": {self.bar.metric: self.bar.least},
            "section": None if self.section is None else self.section.as_dict(),
            "reason": self.reason, "holds": self.holds,
            "calibration": None if self.calibration is None else self.calibration.as_dict(),
            "held_out": None if self.held_out is None else self.held_out.as_dict(),
            "speed_up": list(self.speed),
            "feature_distances": self.feature_distances and list(self.feature_distances),
            "families": [
                {
                    "name": one.name, "num_trials": one.num_trials,
                    "best": None if one.best is None else one.best.as_dict(),
                }
                for one in self.families
            ],
            "path": None if self.path is None else str(self.path),
            "report": None if self.report is None else str(self.report),
        }  # fmt: skip


def find_cache(
    source: str | Sampler, output: Path | None = None, *, prompts: Path | None = None,
    min_psnr: float | None = None, min_ssim: float | None = None, num_clips: int = 4,
    num_steps: int | None = None, size: tuple[int, int, int] | None = None, seed: int = 0,
    force: bool = False, features: str | None = None, progress: Progress | None = None,
) -> CacheFound:  # fmt: skip
    """Find policy and settings under a quality target, and hold them out on other clips.

    Args:
        source: folder of a diffusers pipeline, "reference:bouncing-garments", or a sampler.
        output: the plan; a report is written beside it. None writes nothing.
        prompts: a text file, one a line; or a .pt file with prompt_embeds.
        min_psnr, min_ssim: the target, one of them, against the full model from the same noise.
        num_clips: to calibrate on, twice as many others to confirm on, and as many to hold out.
        num_steps, size: where they are not what the pipeline does by itself.
        seed: of the first clip.
        force: replace a plan that is there.
        features: a recogniser, as for `load_model`, by which held-out clips are compared as well.
        progress: who is told.

    Raises:
        InputError: pipeline, prompts or target are wrong; or the cache was never consulted.
    """
    progress = progress or Silent()
    if (min_psnr is None) == (min_ssim is None):
        message = (
            "a cache needs one quality target: give --min-psnr (30, for instance) or --min-ssim"
        )
        raise InputError(message)
    bar = Bar("ssim", min_ssim or 0) if min_psnr is None else Bar("psnr_db", min_psnr)
    if output is not None:
        # It needs this module.
        from vcompress.pipeline.order import check_plan_output

        check_plan_output(output, force=force)
    with progress.stage("load"):
        reader = None if features is None else FeatureReader(features)
        sampler = source if isinstance(source, Sampler) else open_sampler(
            source, num_steps=num_steps, size=size
        )  # fmt: skip
    known = read_prompts(prompts, sampler)
    facts: dict[str, Any] = {"name": sampler.name, "num_steps": sampler.num_steps, "bar": bar}
    if sampler.cannot_pay is not None:
        return CacheFound(section=None, reason=sampler.cannot_pay, **facts)
    calibration, held_out = make_cases(known, num_clips, seed)
    more = make_more(known, 2 * num_clips, seed)
    found = Search(sampler, calibration, progress, confirm=more).run(bar)
    facts |= {"families": tuple(found)}
    best = found[0].best
    if best is None:
        why = (
            f"no cache holds {bar.metric} {bar.least:g} on the calibration clips; nothing is cached"
        )
        progress.warn(why)
        return CacheFound(section=None, reason=why, **facts)
    with progress.stage("hold out", 2 * len(held_out)) as advance:
        full, trial, speed = measured(sampler, best.section, held_out, advance)
    reached = float(np.mean(trial.values(bar.metric)))
    why = f"{bar.metric} {reached:.4g} on {len(held_out)} held-out clips, {bar.least:g} asked"
    result = CacheFound(
        section=best.section, reason=why, calibration=best, held_out=trial, speed=speed,
        cases=tuple(held_out), full=tuple(full),
        feature_distances=None
        if reader is None
        else tuple(map(reader.distance, full, trial.clips)),
        **facts,
    )  # fmt: skip
    if not trial.report.hits.any():
        progress.warn("the cache reused nothing on held-out clips; do without one")
    return result if output is None else _written(result, output, seed)


def measured(
    sampler: Sampler, section: CacheSection, cases: Sequence[Case], advance: Any
) -> tuple[list[Frames], Trial, tuple[float, ...]]:
    """Full and cached clips of `cases`, and wall clock of full over cached, one after the other."""
    full, speed, trials = [], [], []
    for case in cases:
        started = time.perf_counter()
        full.append(sampler.sample(case))
        between = time.perf_counter()
        advance(1)
        trials.append(run_section(sampler, section, [case], full[-1:]))
        speed.append((between - started) / (time.perf_counter() - between))
        advance(1)
    return full, Trial.together(trials), tuple(speed)


def _written(found: CacheFound, output: Path, seed: int) -> CacheFound:
    from vcompress.pipeline.cache_report import write_report

    data = found.as_dict()
    plan = CompressionPlan(
        target="mixed", seed=seed, model={"name": found.name, "task": "denoise"}, quantize={},
        cache=found.section,
        evidence={
            "vcompress": vcompress.__version__, "torch": torch.__version__,
            "cache": {key: data[key] for key in ("bar", "holds", "calibration", "held_out",
                                                 "speed_up")},
        },
    )  # fmt: skip
    save_plan(plan, {}, output)
    report = output.with_suffix(".html")
    written = replace(found, path=output, report=report)
    write_report(written, report)
    return written


def cached(pipe: Any, source: Path | str) -> Cached:
    """Cache in the diffusers pipeline `pipe` what a plan or an artifact at `source` says.

        handle = vcompress.cached(pipe, "plan.json")
        video = pipe(prompt="a cat", num_inference_steps=50)
        print(handle.report())

    Both transformers of Wan 2.2 share the cache of one run. `handle.remove()` ends it.

    Raises:
        InputError: no section `cache` there, or a cache is in place already.
    """
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).is_file():
        path = Artifact.open(path).file("plan") or path
    section = read_plan(path)[0].cache
    if section is None:
        message = f"{source}: this plan has no section cache; make one with vcompress cache"
        raise InputError(message)
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    modules = [module for module in found if isinstance(module, nn.Module)]
    for module in modules:
        own = getattr(module, "vcompress_cache", None)
        if isinstance(own, Cached):
            own.remove()
    return apply_cache(modules, section, scheduler=getattr(pipe, "scheduler", None))
