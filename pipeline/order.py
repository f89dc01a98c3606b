"""The one place that knows the order: load, plan, apply, then produce (export, prove, publish)."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from vcompress.calib.calls import Calls
from vcompress.calib.sources import ClipRequest, ClipSets, open_clip_sets
from vcompress.compress.tensors import ModelTensors
from vcompress.export.publish import check_output
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.cache import CacheFound
from vcompress.pipeline.cache_request import JointSearch, cache_request, with_calls
from vcompress.pipeline.dynamic_request import DynamicFound, dynamic_request
from vcompress.pipeline.free_axes import check_dynamic
from vcompress.pipeline.guessing import warn_of_guessing
from vcompress.pipeline.planning import (
    apply_plan,
    check_against,
    make_plan,
    read_plan,
    save_plan,
)
from vcompress.pipeline.run import Options, Outcome, Progress, Recorded, Silent
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.files import check_clips, check_file
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.target import find_target

__all__ = ["apply", "check_plan_output", "open_model_and_clips", "quantize", "write_plan"]

_FEW_CLIPS = 16


def quantize(
    source: str | VideoModel, *, options: Options, load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """The whole job: from a trained model to a proven artifact.

    Raises:
        InputError: the model, the clips or an option is wrong; nothing was written.
        MissingCapabilityError: a package is missing here.
        BuildError: the result does not hold what was planned.
    """
    recorded = Recorded(progress or Silent())
    calls = (options.output or Path("vcompress")).with_suffix(".calls.pt")
    options = with_calls(source, options, calls, recorded)
    model, output = _prepare(source, options, load, recorded)
    clips = _open_clips(model, options, recorded)
    request = cache_request(source, model, options, recorded)
    dynamic = dynamic_request(source, model, options, recorded)
    plan, tensors = make_plan(
        model, clips.calibration, options, recorded, cache=request, dynamic=dynamic
    )
    found = request.found if isinstance(request, JointSearch) else None
    return _produce(
        model, plan, tensors, clips, options, output, recorded, cache=found,
        dynamic=None if dynamic is None else dynamic.found,
    )  # fmt: skip


def open_model_and_clips(
    source: str | VideoModel, options: Options, load: LoadOptions | None, progress: Progress
) -> tuple[VideoModel, ClipSets]:
    """The model at `source` and the clips of `options`.

    Raises:
        InputError: one of them is missing or wrong.
    """
    _require_calib(options)
    model = _load(source, load, options, progress)
    return model, _open_clips(model, options, progress)


def write_plan(
    source: str | VideoModel, path: Path, *, options: Options, load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> CompressionPlan:  # fmt: skip
    """Decide only, and write the plan (and its tensors, if any) to `path`.

    Raises:
        InputError: also where `path` cannot be written, or is there and `options.force` is not set.
    """
    recorded = Recorded(progress or Silent())
    find_target(options.target)
    options = with_calls(source, options, path.with_suffix(".calls.pt"), recorded)
    _require_calib(options)
    check_plan_output(path, force=options.force)
    model, clips = open_model_and_clips(source, options, load, recorded)
    _check_bars(model, options)
    request = cache_request(source, model, options, recorded)
    dynamic = dynamic_request(source, model, options, recorded)
    plan, tensors = make_plan(
        model, clips.calibration, options, recorded, cache=request, dynamic=dynamic
    )
    return save_plan(plan, tensors, path)


def check_plan_output(path: Path, *, force: bool) -> None:
    """Raise `InputError` unless a plan can be written to `path`."""
    check_file(path)
    if path.exists() and not force:
        message = f"{path} is there and may have been edited; add --force to replace it"
        raise InputError(message)


def apply(
    source: str | VideoModel, plan_path: Path, *, options: Options,
    load: LoadOptions | None = None, progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """Execute exactly the plan at `plan_path`, then export, build and prove.

    The clips are drawn as the plan says, so that the test clips are not those that it was
    calibrated on.
    """
    recorded = Recorded(progress or Silent())
    plan, tensors = read_plan(plan_path)
    evidence = plan.evidence
    options = replace(
        options,
        target=plan.target,
        seed=plan.seed,
        num_clips=int(evidence.get("num_clips_asked", options.num_clips)),
        calib=options.calib or str(evidence.get("calib") or "") or None,
    )
    model, output = _prepare(source, options, load, recorded)
    check_against(plan, model, tensors)
    clips = _open_clips(model, options, recorded)
    if clips.calibration.digest != evidence.get("calib_sha256"):
        message = (
            f"{options.calib}: these are not the clips that the plan was calibrated on, so the "
            "held-out test clips may be among those"
        )
        if options.data is None:
            message += "; restore them, or name test clips with --data"
            raise InputError(message)
        recorded.warn(message)
    return _produce(model, plan, tensors, clips, options, output, recorded)


def _produce(
    model: VideoModel, plan: CompressionPlan, tensors: ModelTensors,
    clips: ClipSets, options: Options, output: Path, progress: Recorded, *,
    cache: CacheFound | None = None, dynamic: DynamicFound | None = None,
) -> Outcome:  # fmt: skip
    from vcompress.pipeline.production import produce

    with progress.stage("apply"):
        planned = apply_plan(model, plan, tensors)
    return produce(
        model, planned, plan, tensors, clips, options=options, output=output, progress=progress,
        cache=cache, dynamic=dynamic,
    )  # fmt: skip


def _require_export() -> None:
    """Planning needs little; what follows it needs these packages, so they are asked for first."""
    missing = [
        name for name in ("onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime", "jinja2")
        if importlib.util.find_spec(name) is None
    ]  # fmt: skip
    if missing:
        message = (
            f"export and proof need {', '.join(missing)}: pip install 'vcompress-ai[cpu]'; "
            "vcompress plan works without"
        )
        raise MissingCapabilityError(message)


def _prepare(
    source: str | VideoModel, options: Options, load: LoadOptions | None, progress: Progress
) -> tuple[VideoModel, Path]:
    """Everything that can be wrong with the input is found here, before minutes of work."""
    find_target(options.target)
    _require_export()
    _require_calib(options)
    if options.output is not None:
        check_output(options.output, force=options.force)
    model = _load(source, load, options, progress)
    _check_bars(model, options)
    check_dynamic(model, options.dynamic)
    output = options.output or Path(f"{model.name}-{options.target}")
    check_output(output, force=options.force)
    return model, output


def _check_bars(model: VideoModel, options: Options) -> None:
    """Raise `InputError` if a bar is for another task than that of `model`."""
    if options.max_drop is not None and model.task != "classify":
        message = (
            f"--max-drop is a bar for top-1, but the task of {model.name} is {model.task}; use "
            "--min-sqnr, or --task classify if its output are class scores"
        )
        raise InputError(message)
    if options.min_psnr is not None and model.task != "denoise":
        message = (
            f"--min-psnr is a bar for clips that a denoiser generates, but the task of "
            f"{model.name} is {model.task}; use --max-drop or --min-sqnr"
        )
        raise InputError(message)


def _load(
    source: str | VideoModel, load: LoadOptions | None, options: Options, progress: Progress
) -> VideoModel:
    load = load or LoadOptions()
    if load.calls is None and options.calib is not None:
        # A model of clips does not look at it.
        load = replace(load, calls=Path(options.calib))
    with progress.stage("load"):
        model = source if isinstance(source, VideoModel) else load_model(source, load)
    left = [
        name
        for name, parameter in model.module.named_parameters()
        if parameter.ndim > 1 and name.rpartition(".")[0] not in model.layers
    ]
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        progress.warn(
            f"{shown}: no linear or convolution that runs as a module of its own; kept as it is"
        )
    is_float = isinstance(model.inputs, ClipSpec) and model.inputs.dtype == "float32"
    if is_float and set(model.clip.mean) == {0.0} and set(model.clip.std) == {1.0}:
        progress.warn(
            "no normalisation is known for this model, so its clips are only scaled to 0..1; if it "
            "was trained otherwise, give --mean and --std"
        )
    return model


def _require_calib(options: Options) -> str:
    if options.calib is None:
        message = (
            "calibration clips are needed: add --calib with a folder of videos like those that "
            "the model will see, an .npz or a .pt file; for a denoiser, a file of calls made with "
            "vcompress.record_calls"
        )
        raise InputError(message)
    # Opened after the model, which may take minutes to load.
    check_clips(options.calib)
    check_clips(options.data)
    return options.calib


def _open_clips(model: VideoModel, options: Options, progress: Progress) -> ClipSets:
    request = ClipRequest(
        calib=_require_calib(options), data=options.data, num_clips=options.num_clips,
        num_test_clips=options.num_test_clips, seed=options.seed,
    )  # fmt: skip
    spec = model.inputs if isinstance(model.inputs, ClipSpec) else None
    what = "calls" if spec is None else "clips"
    with progress.stage(what):
        sets = open_clip_sets(request, spec, model.labels)
    if isinstance(sets.calibration, Calls):
        _check_calls(model, sets.calibration, request.calib)
    for name, reason in sets.skipped:
        progress.warn(f"skipped {name}: {reason}")
    if len(sets.calibration) < _FEW_CLIPS:
        progress.warn(
            f"only {len(sets.calibration)} calibration {what}: input ranges may be too small; 64 "
            "or more are better"
        )
    warn_of_guessing(model, sets.calibration, progress)
    return sets


def _check_calls(model: VideoModel, calls: Calls, where: str) -> None:
    """Raise `InputError` unless the model was loaded for calls like these."""
    got = next(calls.tensors(1)).spec
    if got != model.inputs:
        message = (
            f"{where} holds calls with {got}, {model.name} was loaded for {model.inputs}; load it "
            "with LoadOptions(calls=...) of the same file"
        )
        raise InputError(message)
