"""Decide everything, as data; and execute a plan without deciding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import vcompress
from vcompress.calib.calls import Samples
from vcompress.calib.observe import observe
from vcompress.calib.stats import Stats
from vcompress.compress.attention_sites import find_attentions
from vcompress.compress.context import CacheRequest, DynamicRequest, PlanContext
from vcompress.compress.latency_table import LatencyTable
from vcompress.compress.passes import PASSES, AttentionPass
from vcompress.compress.tensors import LayerTensors, ModelTensors, flatten, unflatten
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Options, Progress, Silent
from vcompress.spec.artifact import sha256_of
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.files import replace_file
from vcompress.spec.plan import CompressionPlan, check_plan
from vcompress.spec.target import find_target

__all__ = ["apply_plan", "check_against", "empty_plan", "make_plan", "read_plan", "save_plan"]


def make_plan(
    model: VideoModel, calibration: Samples, options: Options, progress: Progress | None = None,
    *, cache: CacheRequest | None = None, dynamic: DynamicRequest | None = None,
) -> tuple[CompressionPlan, ModelTensors]:  # fmt: skip
    """Decide everything. Returns the plan and the calibrated tensors by layer."""
    progress = progress or Silent()
    budget, tokens = options.budget(model.task), options.token_request(model.task)
    plan = empty_plan(model, calibration, options)
    working = model.copy()
    table: LatencyTable | None = None
    tensors: dict[str, LayerTensors] = {}
    for step in PASSES:
        if options.max_latency is not None and isinstance(step, AttentionPass):
            # Tokens are merged by now, which changes the sizes of the layers.
            table = _latency_table(working, model, options, progress)
        stats = Stats.nothing(calibration)
        if step.needs:
            layers = {name: working.layer(name) for name in working.layers}
            with progress.stage("calibrate", len(calibration)) as advance:
                stats = observe(working, layers, calibration, needs=step.needs, on_batch=advance)
        context = PlanContext(
            target=find_target(options.target), stats=stats, original=model,
            calibration=calibration, tokens=tokens, algorithm=options.algorithm,
            max_layer_error=options.max_layer_error, budget=budget, seed=options.seed,
            stage=progress.stage, warn=progress.warn, attention=options.attention, latency=table,
            cache=cache, dynamic=dynamic,
        )  # fmt: skip
        planned = step.plan(working, plan, context)
        step.apply(working, planned.plan, planned.tensors)
        plan = planned.plan
        tensors.update(planned.tensors)
    return plan, tensors


def empty_plan(model: VideoModel, calibration: Samples, options: Options) -> CompressionPlan:
    """A plan that says what it is for and what it rests on, and decides nothing."""
    grid, clip = model.token_grid, _clip_of(model)
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
            **({} if clip is None else {"clip": clip}),
        },
        evidence={
            "calib": options.calib,
            "calib_sha256": calibration.digest,
            "num_clips": len(calibration),
            "num_clips_asked": options.num_clips,
            **({"skipped_clips": dict(calibration.skipped)} if calibration.skipped else {}),
            "algorithm": options.algorithm,
            "max_layer_error": options.max_layer_error,
            "vcompress": vcompress.__version__,
            "torch": torch.__version__,
        },
        quantize={},
    )


def _clip_of(model: VideoModel) -> dict[str, Any] | None:
    """How a video becomes the model's input, as plain data; None where it takes no clips."""
    return model.inputs.as_dict() if isinstance(model.inputs, ClipSpec) else None


def _latency_table(
    working: VideoModel, model: VideoModel, options: Options, progress: Progress
) -> LatencyTable:
    """The table of `working`, and the time of the float `model` with it."""
    # It needs `order`, which needs this.
    from vcompress.pipeline.timing import table_for

    target = find_target(options.target)
    formats = tuple(dict.fromkeys((*target.formats, *target.attention)))
    return table_for(working, model, formats, options.latency_table, progress)


def check_against(plan: CompressionPlan, model: VideoModel, tensors: ModelTensors) -> None:
    """Raise one `InputError` that lists everything in `plan` that does not fit `model`."""
    attentions = () if plan.attention is None else find_attentions(model.module, model.example(1))
    check_plan(
        plan, layers=model.layers, blocks=model.blocks, weights_sha256=model.weights_sha256,
        clip=_clip_of(model), parts=tensors, attentions=tuple(attentions),
    )  # fmt: skip


def apply_plan(
    model: VideoModel, plan: CompressionPlan, tensors: ModelTensors | None = None
) -> VideoModel:
    """A copy of `model` on which every pass executed its section of `plan`.

    Raises:
        InputError: the plan does not fit the model; the message lists everything that is wrong.
    """
    tensors = tensors or {}
    check_against(plan, model, tensors)
    planned = model.copy()
    for step in PASSES:
        step.apply(planned, plan, tensors)
    return planned


def save_plan(plan: CompressionPlan, tensors: ModelTensors, path: Path) -> CompressionPlan:
    """Write `plan` to `path`, and calibrated tensors beside it; returns the plan as written."""
    if tensors:
        file = path.with_suffix(".safetensors")
        replace_file(file, save(flatten(tensors)))
        plan = replace(plan, tensors={"file": file.name, "sha256": sha256_of(file)})
    replace_file(path, plan.to_json())
    return plan


def read_plan(path: Path) -> tuple[CompressionPlan, ModelTensors]:
    """The plan at `path` and its tensors; their digest is checked."""
    plan = CompressionPlan.load(path)
    if plan.tensors is None:
        return plan, {}
    file = path.parent / Path(plan.tensors["file"]).name
    if not file.is_file() or sha256_of(file) != plan.tensors["sha256"]:
        message = f"{file} is missing or was changed since {path} was made; make the plan again"
        raise InputError(message)
    return plan, unflatten(load_file(file))
