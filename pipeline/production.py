"""From a planned model to a published artifact: export, read back, build, prove, publish."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcompress.calib.sources import ClipSets
from vcompress.compress.attention_sites import find_attentions
from vcompress.compress.restore import save_module
from vcompress.compress.tensors import ModelTensors
from vcompress.export import engine as engines
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.export.manifest import GOLDEN_INPUTS, INPUT_NAME, OUTPUT_NAME, onnx_metadata
from vcompress.export.publish import staged_directory, write_manifest
from vcompress.export.readback import read_precision
from vcompress.export.runtime import open_session
from vcompress.export.shape_profiles import ShapeProfile, profiles_around
from vcompress.models.calls import Call, named_arrays
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline import proof as proving
from vcompress.pipeline.cache import CacheFound
from vcompress.pipeline.cache_report import write_report as write_cache_report
from vcompress.pipeline.dynamic_report import write_precision_report
from vcompress.pipeline.dynamic_request import DynamicFound
from vcompress.pipeline.free_axes import check_second_shape, free_axes_of
from vcompress.pipeline.planning import save_plan
from vcompress.pipeline.record import Run, file_role, manifest_of, report_of
from vcompress.pipeline.run import Options, Outcome, Progress, Recorded
from vcompress.pipeline.speedup import check_speed_bar, time_graphs
from vcompress.spec import strict_json
from vcompress.spec.attention_section import PRODUCT_FORMATS
from vcompress.spec.defaults import MAX_DROP_POINTS
from vcompress.spec.errors import BuildError, MissingCapabilityError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.target import find_target
from vcompress.validate import gate, html, report
from vcompress.validate.report_types import Engine
from vcompress.validate.speed import SpeedVerdict, with_speed

__all__ = ["produce"]

_NUM_GOLDEN = 2
# Of the names in the files: the model stands inside `PrimaryOutput`.
_PREFIX = "model."


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """The exported files of one run, in its working folder."""

    baseline: GraphFacts
    portable: GraphFacts
    tensorrt: GraphFacts


def produce(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan,
    tensors: ModelTensors, clips: ClipSets, *,
    options: Options, output: Path, progress: Recorded, cache: CacheFound | None = None,
    dynamic: DynamicFound | None = None,
) -> Outcome:  # fmt: skip
    """Make, prove and publish the artifact.

    A result that misses its bar is published as `<output>.rejected`.

    Raises:
        BuildError: a file does not hold what was planned, or computes something else.
    """
    check_speed_bar(options.min_speedup, proving.why_simulated(None, plan))
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        folder = Path(name)
        plan = save_plan(plan, tensors, folder / "plan.json")
        with progress.stage("export", 3) as advance:
            graphs = _export(model, planned, plan, folder, options, advance)
        _verify(plan, graphs, progress)
        _verify_free_axes(model, planned, plan, graphs, clips, options, progress)
        _verify_attention(model, plan, graphs)
        built = _build_engines(model, graphs, plan, options, folder, progress)
        with progress.stage("prove", 3 * len(clips.test)) as advance:
            proof = proving.prove(_forms(model, planned, graphs), plan, clips.test, advance)
        bar = _bar(options, clips, model)
        judged = gate.judge(proof.metrics, max_drop_points=bar, min_sqnr_db=options.min_sqnr)
        verdict = with_speed(
            _with_generated(judged, plan, options), _speed(proof, graphs, clips, options, progress)
        )
        for path in graphs.baseline.files:
            path.unlink()
        _write_data(folder, model, clips, proof)
        if "_class_name" in model.config:
            _write_module(folder, planned)
        if cache is not None:
            code = f'pipe.transformer = vcompress.compressed("{output.name}/")'
            write_cache_report(cache, folder / "cache.html", code=code)
        if dynamic is not None:
            write_precision_report(dynamic, folder / "precision.html", artifact=output.name)
        run = Run(
            model=model, planned=planned, plan=plan, clips=clips, options=options, proof=proof,
            max_drop_points=bar, verdict=verdict, engines=built, warnings=progress.warnings,
        )  # fmt: skip
        made = report_of(run, folder)
        (folder / "report.json").write_text(report.to_json(made), encoding="utf-8")
        (folder / "report.html").write_text(html.render_html(made), encoding="utf-8")
        manifest = manifest_of(run, made, graphs.portable, graphs.tensorrt)
        target = output if verdict.outcome != "fail" else _rejected(output)
        with (
            progress.stage("publish"),
            staged_directory(target, force=options.force or target != output) as staging,
        ):
            for path in folder.iterdir():
                shutil.move(path, staging / path.name)
            write_manifest(staging, manifest, roles=_roles(staging), about=_about(graphs, built))
    return Outcome(path=target, plan=plan, report=made, verdict=verdict)


def _with_generated(verdict: gate.Verdict, plan: CompressionPlan, options: Options) -> gate.Verdict:
    """With the clips that a search has generated held to their bar: the last one's, a cache's."""
    found = (plan.evidence.get(name, {}) for name in ("cache", "dynamic_precision"))
    measured = next((one["held_out"] for one in found if one.get("held_out")), None)
    if options.min_psnr is None or measured is None:
        return verdict
    return gate.with_generated(verdict, measured["psnr_db"], options.min_psnr)


def _speed(
    proof: proving.Proof, graphs: Graphs, clips: ClipSets, options: Options, progress: Progress
) -> SpeedVerdict | None:
    """The speed-up against its bar, if one is set."""
    if options.min_speedup is None:
        return None
    result = next(stage for stage in proof.stages if stage["name"] == proving.RESULT)
    check_speed_bar(options.min_speedup, result["latency_reason"])
    sample = next(clips.test.tensors(1))
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        return time_graphs(
            graphs.baseline.files[0], graphs.portable.files[0], sample, options.min_speedup,
            progress, Path(name),
        )  # fmt: skip


def _rejected(output: Path) -> Path:
    return output.with_name(f"{output.name}.rejected")


def _export(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan, folder: Path,
    options: Options, advance: Any,
) -> Graphs:  # fmt: skip
    example = model.example()
    axes = free_axes_of(model, plan, options.dynamic)
    described = onnx_metadata(model, plan)

    def export(subject: VideoModel, name: str, dialect: str) -> GraphFacts:
        facts = export_onnx(
            PrimaryOutput(subject.module, example), example, folder / name, dialect=dialect,
            input_name=INPUT_NAME, output_name=OUTPUT_NAME, metadata=described,
            free_axes={INPUT_NAME: axes} if axes else {},
        )  # fmt: skip
        advance(1)
        return facts

    return Graphs(
        baseline=export(model, "baseline.onnx", "portable"),
        portable=export(planned, "model.onnx", "portable"),
        tensorrt=export(planned, "model.tensorrt.onnx", "tensorrt"),
    )


def _verify(plan: CompressionPlan, graphs: Graphs, progress: Progress) -> None:
    """Read the formats back from the files: what was planned is what they hold."""
    unquantized = read_precision(graphs.baseline.files[0], prefix=_PREFIX).layers
    for name in plan.quantize:
        if name not in unquantized:
            progress.warn(f"{name} does not reach the exported output; its format has no effect")
    for facts in (graphs.portable, graphs.tensorrt):
        found = read_precision(facts.files[0], prefix=_PREFIX).formats
        problems = []
        for name, choice in plan.quantize.items():
            expected = "float" if choice.format == FLOAT else choice.format
            if name in unquantized and found.get(name, "nothing") != expected:
                problems.append(
                    f"{name}: planned {choice.format}, the file holds {found.get(name, 'nothing')}"
                )
        if problems:
            listed = "\n  ".join(problems[:20])
            message = f"{facts.files[0].name} does not hold what was planned:\n  {listed}"
            raise BuildError(message)


def _verify_free_axes(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan, graphs: Graphs,
    clips: ClipSets, options: Options, progress: Progress,
) -> None:  # fmt: skip
    """What was asked to be free is, and holds at a second shape."""
    axes = free_axes_of(model, plan, options.dynamic)
    if axes:
        path = graphs.portable.files[0]
        with progress.stage("second shape"):
            check_second_shape(planned, open_session(path), path, clips.test, axes)


def _verify_attention(model: VideoModel, plan: CompressionPlan, graphs: Graphs) -> None:
    """The same for products of attention, which have no names in a file: their number is right."""
    if plan.attention is None:
        return
    calls = find_attentions(model.module, model.example())
    lost = 2 * sum(map(len, calls.values())) - len(
        read_precision(graphs.baseline.files[0]).products
    )
    planned = Counter[str]()
    for name, choice in plan.attention.items():
        formats = [each for each in PRODUCT_FORMATS.get(choice.format, ()) if each != FLOAT]
        planned.update(formats * len(calls[name]))
    for facts in (graphs.portable, graphs.tensorrt):
        products = Counter(each.format for each in read_precision(facts.files[0]).products)
        for format_name in planned:
            missing = planned[format_name] - products[format_name]
            # An attention that the output does not depend on is in no file.
            if not 0 <= missing <= max(0, lost):
                message = (
                    f"{facts.files[0].name} does not hold what was planned: "
                    f"{planned[format_name]} products of attention in {format_name}, the file has "
                    f"{products[format_name]}"
                )
                raise BuildError(message)


def _build_engines(
    model: VideoModel, graphs: Graphs, plan: CompressionPlan, options: Options, folder: Path,
    progress: Progress,
) -> list[Engine]:  # fmt: skip
    built: list[Engine] = []
    source = graphs.tensorrt.files[0]
    profiles = None
    if options.dynamic:
        profiles = profiles_around(source, {INPUT_NAME: (1, *model.clip.input_shape)})
    for sm in find_target(plan.target).engine_sm:
        path = folder / f"model.sm{sm}.engine"
        entry = Engine(
            runtime="TensorRT-RTX", sm=sm, status="not built", seconds=None, bytes=None,
            reason="switched off with --no-engine",
            command=engines.build_command(source, path, profiles),
        )  # fmt: skip
        if options.engine:
            with progress.stage(f"engine SM{sm}"):
                entry.update(_build_engine(source, path, sm, profiles))
        if entry["reason"] is not None and options.engine:
            progress.warn(f"no engine for SM{sm}: {entry['reason']}")
        built.append(entry)
    return built


def _build_engine(
    source: Path, path: Path, sm: str, profiles: Mapping[str, ShapeProfile] | None
) -> Engine:
    """The fields that an attempt changes."""
    entry: dict[str, Any]
    try:
        facts = engines.build_engine(source, path, sm=sm, shape_profiles=profiles)
    except (BuildError, MissingCapabilityError) as error:
        status = "failed" if isinstance(error, BuildError) else "not built"
        entry = {"status": status, "reason": str(error)}
    else:
        entry = {
            "status": "built", "seconds": round(facts.seconds, 2), "bytes": facts.num_bytes,
            "reason": None,
        }  # fmt: skip
    return entry  # type: ignore[return-value]


def _forms(model: VideoModel, planned: VideoModel, graphs: Graphs) -> proving.Forms:
    own_operators = graphs.tensorrt.own_operators
    return proving.Forms(
        baseline=model,
        planned=planned,
        baseline_session=open_session(graphs.baseline.files[0]),
        baseline_path=graphs.baseline.files[0],
        portable_session=open_session(graphs.portable.files[0]),
        portable_path=graphs.portable.files[0],
        tensorrt_path=graphs.tensorrt.files[0],
        tensorrt_session=None if own_operators else open_session(graphs.tensorrt.files[0]),
        tensorrt_reason=(
            f"{', '.join(own_operators)}: known to TensorRT only; formats and weights are read back"
            if own_operators
            else ""
        ),
    )


def _bar(options: Options, clips: ClipSets, model: VideoModel) -> float | None:
    if options.max_drop is None and model.task == "classify" and clips.test.labels is not None:
        return MAX_DROP_POINTS
    return options.max_drop


def _write_data(folder: Path, model: VideoModel, clips: ClipSets, proof: proving.Proof) -> None:
    """Golden clips for the edge, and the outputs that `vcompress validate` compares with."""
    count = min(_NUM_GOLDEN, len(clips.test))
    samples = next(clips.test.tensors(count))
    inputs = named_arrays(samples, [GOLDEN_INPUTS])
    if isinstance(samples, Call):
        inputs = {f"{GOLDEN_INPUTS}.{name}": array for name, array in inputs.items()}
    arrays: dict[str, Any] = {**inputs, "outputs": proof.result_outputs[:count]}
    np.savez_compressed(folder / "golden.npz", **arrays)
    np.savez_compressed(
        folder / "proof.npz", baseline=proof.baseline_outputs, result=proof.result_outputs
    )
    if model.labels:
        (folder / "labels.txt").write_text("\n".join(model.labels) + "\n", encoding="utf-8")


def _write_module(folder: Path, planned: VideoModel) -> None:
    """What `vcompress.compressed` builds the planned module from."""
    save_module(planned.module, folder / "weights.safetensors")
    config = {
        key: value
        for key, value in planned.config.items()
        # Where the model was loaded from is nobody's business.
        if not key.startswith("_") or key in ("_class_name", "_diffusers_version")
    }
    (folder / "config.json").write_text(strict_json.dump(config), encoding="utf-8")


def _roles(folder: Path) -> dict[str, str]:
    return {path.name: file_role(path.name) for path in folder.iterdir()}


def _about(graphs: Graphs, built: list[Engine]) -> dict[str, dict[str, Any]]:
    about: dict[str, dict[str, Any]] = {
        facts.files[0].name: {"opset": facts.opset, "dialect": facts.dialect}
        for facts in (graphs.portable, graphs.tensorrt)
    }
    for entry in built:
        if entry["status"] == "built":
            about[f"model.sm{entry['sm']}.engine"] = {
                "runtime": entry["runtime"],
                "version": engines.library_version(),
                "sm": entry["sm"],
            }
    return about
