"""Decide everything, as data; and execute a plan without deciding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import vcompress
from vcompress.calib.clips import Clips
from vcompress.calib.observe import observe
from vcompress.calib.stats import Stats
from vcompress.compress import quantize as quantization
from vcompress.compress.passes import PASSES, PlanContext
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Options, Progress, Silent
from vcompress.spec.artifact import sha256_of
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan, check_plan
from vcompress.spec.target import find_target

__all__ = ["apply_plan", "make_plan", "read_plan", "save_plan"]

_NUM_MEASUREMENT_CLIPS = 8


def make_plan(
    model: VideoModel, calibration: Clips, options: Options, progress: Progress | None = None
) -> tuple[CompressionPlan, dict[str, torch.Tensor]]:
    """Decide everything. Returns the plan and the calibrated input factors by layer."""
    progress = progress or Silent()
    target = find_target(options.target)
    plan = _empty_plan(model, calibration, options)
    clips = torch.from_numpy(next(calibration.batches(_NUM_MEASUREMENT_CLIPS)))
    working = model.copy()
    smoothing: dict[str, torch.Tensor] = {}
    for step in PASSES:
        stats = Stats.nothing(calibration)
        if step.needs:
            stats, smoothing = _observe(working, calibration, step.needs, options, progress)
        with progress.stage("plan", len(model.layers)) as advance:
            context = PlanContext(
                target=target, stats=stats, original=model, clips=clips, tokens=options.tokens,
                max_layer_error=options.max_layer_error, smoothing=smoothing, on_layer=advance,
            )  # fmt: skip
            plan = step.plan(working, plan, context)
        step.apply(working, plan, smoothing)
    return plan, smoothing


def _observe(
    working: VideoModel, calibration: Clips, needs: frozenset[str], options: Options,
    progress: Progress,
) -> tuple[Stats, dict[str, torch.Tensor]]:  # fmt: skip
    layers = {name: working.layer(name) for name in working.layers}
    with progress.stage("calibrate", len(calibration)) as advance:
        stats = observe(working, layers, calibration, needs=needs, on_batch=advance)
    if options.algorithm == "max":
        return stats, {}
    from vcompress.compress.modelopt_bridge import calibrate

    def run_clips(subject: VideoModel) -> None:
        for batch in calibration.batches(_NUM_MEASUREMENT_CLIPS):
            subject(torch.from_numpy(batch))

    formats = {
        name: candidate
        for name, candidate in quantization.candidate_formats(
            working, find_target(options.target)
        ).items()
        if candidate != FLOAT and name in stats.input_amax
    }
    with progress.stage(f"calibrate with modelopt ({options.algorithm})"):
        calibrated = calibrate(working, formats, options.algorithm, run_clips)
    if options.algorithm != "modelopt-max" and not calibrated.smoothing:
        progress.warn(f"{options.algorithm} smoothed no layer of this model and target")
    return replace(stats, input_amax=calibrated.input_amax), calibrated.smoothing


def _empty_plan(model: VideoModel, calibration: Clips, options: Options) -> CompressionPlan:
    grid = model.token_grid
    return CompressionPlan(
        target=options.target,
        seed=options.seed,
        model={
            "name": model.name,
            "family": model.family,
            "task": model.task,
            "weights_sha256": model.weights_sha256,
            "num_blocks": len(model.blocks),
            "token_grid": None if grid is None else [grid.frames, grid.height, grid.width],
        },
        evidence={
            "calib": options.calib,
            "calib_sha256": calibration.digest,
            "num_clips": len(calibration),
            "num_clips_asked": options.num_clips,
            "algorithm": options.algorithm,
            "max_layer_error": options.max_layer_error,
            "vcompress": vcompress.__version__,
            "torch": torch.__version__,
        },
        quantize={},
    )


def apply_plan(
    model: VideoModel, plan: CompressionPlan, smoothing: Mapping[str, torch.Tensor] | None = None
) -> VideoModel:
    """A copy of `model` on which every pass executed its section of `plan`.

    Raises:
        InputError: the plan does not fit the model; the message lists everything that is wrong.
    """
    check_plan(plan, layers=model.layers, blocks=model.blocks, weights_sha256=model.weights_sha256)
    planned = model.copy()
    for step in PASSES:
        step.apply(planned, plan, smoothing or {})
    return planned


def save_plan(
    plan: CompressionPlan, smoothing: Mapping[str, torch.Tensor], path: Path
) -> CompressionPlan:
    """Write `plan` to `path`, and calibrated tensors beside it; returns the plan as written."""
    if smoothing:
        tensors = path.with_suffix(".safetensors")
        save_file({name: tensor.contiguous() for name, tensor in smoothing.items()}, tensors)
        plan = replace(plan, tensors={"file": tensors.name, "sha256": sha256_of(tensors)})
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(plan.to_json(), encoding="utf-8")
    temporary.replace(path)
    return plan


def read_plan(path: Path) -> tuple[CompressionPlan, dict[str, torch.Tensor]]:
    """The plan at `path` and its tensors; their digest is checked."""
    plan = CompressionPlan.load(path)
    if plan.tensors is None:
        return plan, {}
    tensors = path.parent / Path(plan.tensors["file"]).name
    if not tensors.is_file() or sha256_of(tensors) != plan.tensors["sha256"]:
        message = f"{tensors} is missing or was changed since {path} was made; make the plan again"
        raise InputError(message)
    return plan, load_file(tensors)
