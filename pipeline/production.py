"""From a planned model to a published artifact: export, read back, build, prove, publish."""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vcompress
from vcompress.calib.sources import ClipSets
from vcompress.compress.frozen import FrozenLayer
from vcompress.export import engine as engines
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.export.manifest import INPUT_NAME, OUTPUT_NAME, build_manifest, onnx_metadata
from vcompress.export.publish import staged_directory, write_manifest
from vcompress.export.readback import read_precision
from vcompress.export.runtime import open_session
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline import proof as proving
from vcompress.pipeline.planning import save_plan
from vcompress.pipeline.run import Options, Outcome, Progress
from vcompress.spec.defaults import MAX_DROP_POINTS
from vcompress.spec.errors import BuildError, MissingCapabilityError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.target import find_target
from vcompress.validate import gate, html, latency, report
from vcompress.validate.report_types import Engine, Layer, Report

__all__ = ["produce"]

_NUM_GOLDEN = 2


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """The exported files of one run, in its working folder."""

    baseline: Path
    portable: GraphFacts
    tensorrt: GraphFacts


def produce(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan,
    smoothing: Mapping[str, torch.Tensor], clips: ClipSets, *,
    options: Options, output: Path, progress: Progress,
) -> Outcome:  # fmt: skip
    """Make, prove and publish the artifact.

    A result that misses its bar is published as `<output>.rejected`.

    Raises:
        BuildError: a file does not hold what was planned, or computes something else.
    """
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        folder = Path(name)
        plan = save_plan(plan, smoothing, folder / "plan.json")
        with progress.stage("export", 3) as advance:
            graphs = _export(model, planned, plan, folder, advance)
        _verify(planned, plan, graphs)
        built = _build_engines(graphs, plan, options, folder, progress)
        with progress.stage("prove", 3 * len(clips.test)) as advance:
            proof = proving.prove(_forms(model, planned, plan, graphs), plan, clips.test, advance)
        verdict = gate.judge(
            proof.metrics, max_drop_points=_bar(options, clips, model), min_sqnr_db=options.min_sqnr
        )
        graphs.baseline.unlink()
        _write_data(folder, model, clips, proof)
        made = _report(model, planned, plan, clips, proof, verdict, built, options, folder)
        (folder / "report.json").write_text(report.to_json(made), encoding="utf-8")
        (folder / "report.html").write_text(html.render_html(made), encoding="utf-8")
        manifest = _manifest(model, plan, graphs, clips, made, proof, options)
        target = output if verdict.outcome != "fail" else _rejected(output)
        with (
            progress.stage("publish"),
            staged_directory(target, force=options.force or target != output) as staging,
        ):
            for path in folder.iterdir():
                shutil.move(path, staging / path.name)
            write_manifest(staging, manifest, roles=_roles(staging), about=_about(graphs, built))
    return Outcome(path=target, plan=plan, report=made, verdict=verdict)


def _rejected(output: Path) -> Path:
    return output.with_name(f"{output.name}.rejected")


def _export(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan, folder: Path, advance: Any
) -> Graphs:
    example = model.example()
    names = {"input_name": INPUT_NAME, "output_name": OUTPUT_NAME}
    described = onnx_metadata(model, plan)
    baseline = folder / "baseline.onnx"
    export_onnx(PrimaryOutput(model.module), example, baseline, dialect="portable", **names)
    advance(1)
    facts = []
    for dialect, file in (("portable", "model.onnx"), ("tensorrt", "model.tensorrt.onnx")):
        facts.append(
            export_onnx(
                PrimaryOutput(planned.module), example, folder / file,
                dialect=dialect, metadata=described, **names,
            )
        )  # fmt: skip
        advance(1)
    return Graphs(baseline=baseline, portable=facts[0], tensorrt=facts[1])


def _verify(planned: VideoModel, plan: CompressionPlan, graphs: Graphs) -> None:
    """Read the formats back from the files: what was planned is what they hold."""
    for facts in (graphs.portable, graphs.tensorrt):
        found = read_precision(facts.files[0], prefix="model.").layers
        problems = []
        for name, choice in plan.quantize.items():
            actual = found[name].weight_format if name in found else "no such layer"
            if choice.format != FLOAT and actual != choice.format:
                problems.append(f"{name}: planned {choice.format}, the file holds {actual}")
        if problems:
            message = f"{facts.files[0].name} does not hold what was planned:\n  " + "\n  ".join(
                problems[:20]
            )
            raise BuildError(message)


def _build_engines(
    graphs: Graphs, plan: CompressionPlan, options: Options, folder: Path, progress: Progress
) -> list[Engine]:
    built: list[Engine] = []
    source = graphs.tensorrt.files[0]
    for sm in find_target(plan.target).engine_sm:
        path = folder / f"model.sm{sm}.engine"
        entry = Engine(
            runtime="TensorRT-RTX", sm=sm, status="not built", seconds=None, bytes=None,
            reason="switched off with --no-engine", command=engines.build_command(source, path),
        )  # fmt: skip
        if options.engine:
            with progress.stage(f"engine SM{sm}"):
                entry.update(_build_engine(source, path, sm))
        if entry["reason"] is not None and options.engine:
            progress.warn(f"no engine for SM{sm}: {entry['reason']}")
        built.append(entry)
    return built


def _build_engine(source: Path, path: Path, sm: str) -> Engine:
    """The fields that an attempt changes."""
    entry: dict[str, Any]
    try:
        facts = engines.build_engine(source, path, sm=sm)
    except (BuildError, MissingCapabilityError) as error:
        status = "failed" if isinstance(error, BuildError) else "not built"
        entry = {"status": status, "reason": str(error)}
    else:
        entry = {
            "status": "built", "seconds": round(facts.seconds, 2), "bytes": facts.num_bytes,
            "reason": None,
        }  # fmt: skip
    return entry  # type: ignore[return-value]


def _forms(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan, graphs: Graphs
) -> proving.Forms:
    holds_nvfp4 = any(choice.format == "nvfp4" for choice in plan.quantize.values())
    return proving.Forms(
        baseline=model,
        planned=planned,
        baseline_session=open_session(graphs.baseline),
        portable_session=open_session(graphs.portable.files[0]),
        tensorrt_session=None if holds_nvfp4 else open_session(graphs.tensorrt.files[0]),
        tensorrt_reason=(
            "its FP4 operators exist in TensorRT only; formats and weights are read back"
            if holds_nvfp4
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
    np.savez_compressed(
        folder / "golden.npz",
        inputs=np.stack([clips.test[index] for index in range(count)]),
        outputs=proof.result_outputs[:count],
    )
    labels = {} if clips.test.labels is None else {"labels": np.array(clips.test.labels)}
    np.savez_compressed(
        folder / "proof.npz", baseline=proof.baseline_outputs, result=proof.result_outputs, **labels
    )
    if model.labels:
        (folder / "labels.txt").write_text("\n".join(model.labels) + "\n", encoding="utf-8")


def _parameter_bits(module: torch.nn.Module) -> int:
    return sum(8 * p.numel() * p.element_size() for p in module.parameters())


def _planned_bits(planned: VideoModel) -> int:
    """Bits of all weights: frozen ones with their scales, the rest as they are."""
    bits = _parameter_bits(planned.module)
    for module in planned.module.modules():
        if isinstance(module, FrozenLayer):
            bits += module.weight_bits + (0 if module.bias is None else 32 * module.bias.numel())
    return bits


def _layer_rows(model: VideoModel, planned: VideoModel, plan: CompressionPlan) -> list[Layer]:
    rows: list[Layer] = []
    for name, choice in plan.quantize.items():
        layer = planned.layer(name)
        weight = model.layer(name).weight
        assert isinstance(weight, torch.Tensor)
        bits = (
            layer.weight_bits
            if isinstance(layer, FrozenLayer)
            else 8 * weight.numel() * weight.element_size()
        )
        rows.append(
            Layer(
                name=name, format=choice.format, score=choice.score, reason=choice.reason,
                weight_kib=bits / 8192, block=model.block_of(name),
            )
        )  # fmt: skip
    return rows


def _report(
    model: VideoModel, planned: VideoModel, plan: CompressionPlan, clips: ClipSets,
    proof: proving.Proof, verdict: gate.Verdict, built: list[Engine], options: Options,
    folder: Path,
) -> Report:  # fmt: skip
    parameters = sum(p.numel() for p in model.module.parameters())
    baseline_bits, planned_bits = _parameter_bits(model.module), _planned_bits(planned)
    tokens = plan.tokens
    return report.build_report(
        vcompress=vcompress.__version__,
        created=_now(),
        command=options.command or shlex.join(["vcompress", *sys.argv[1:]]),
        seed=plan.seed,
        target=plan.target,
        model={
            "name": model.name, "family": model.family, "task": model.task,
            "weights_sha256": model.weights_sha256, "num_parameters": parameters,
            "num_classes": proof.baseline_outputs.shape[-1] if model.task == "classify" else None,
        },
        verdict=verdict,
        result_stage=proving.RESULT,
        stages=proof.stages,
        sizes={
            "baseline_weights_mib": baseline_bits / 8 / 2**20,
            "result_weights_mib": planned_bits / 8 / 2**20,
            "files": [
                {"path": path.name, "role": _role(path.name), "bytes": path.stat().st_size}
                for path in sorted(folder.iterdir())
            ],
        },
        precision={
            "baseline_effective_bits": baseline_bits / parameters,
            "result_effective_bits": planned_bits / parameters,
            "read_back_from": "model.onnx",
        },
        layers=_layer_rows(model, planned, plan),
        tokens=None if tokens is None else {
            "technique": tokens.technique,
            "num_tokens_baseline": tokens.num_tokens,
            "num_tokens_result": tokens.num_tokens - sum(tokens.merge.values()),
            "num_merged_by_block": dict(tokens.merge),
        },
        engines=built,
        clips={
            "test": {
                "source": clips.test_source, "num_clips": len(clips.test),
                "sha256": clips.test.digest,
            },
            "calibration": {
                "source": str(options.calib), "num_clips": len(clips.calibration),
                "sha256": clips.calibration.digest,
            },
            "skipped": [{"name": name, "reason": reason} for name, reason in clips.skipped],
        },
        device=latency.describe_device(torch.get_num_threads()),
        versions=_versions(),
        warnings=[],
    )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("onnx", "onnxruntime", "onnxruntime-gpu", "transformers", "nvidia-modelopt",
                 "tensorrt-rtx-cu13", "av", "numpy"):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _manifest(
    model: VideoModel, plan: CompressionPlan, graphs: Graphs, clips: ClipSets, made: Report,
    proof: proving.Proof, options: Options,
) -> dict[str, Any]:  # fmt: skip
    result = next(stage for stage in made["stages"] if stage["name"] == proving.RESULT)
    performance = []
    if result["latency"] is not None:
        performance.append(
            {"file": "model.onnx", "runtime": result["runtime"], "batch": 1, **result["latency"]}
        )
    classify = model.task == "classify" and clips.test.labels is not None
    return build_manifest(
        model, plan, graphs.portable,
        created=made["created"],
        effective_bits=round(made["precision"]["result_effective_bits"], 4),
        quality={
            "metric": "top1_percent" if classify else "sqnr_db",
            "baseline": proof.metrics.get("baseline_top1_percent") if classify else None,
            "result": proof.metrics.get("top1_percent" if classify else "sqnr_db"),
            "verdict": made["verdict"]["outcome"],
            "max_drop_points": made["verdict"]["max_drop_points"],
            "min_sqnr_db": made["verdict"]["min_sqnr_db"],
            "num_clips": len(clips.test),
            "clips": {
                "calib": options.calib, "data": options.data, "num_clips": options.num_clips,
                "num_test_clips": options.num_test_clips, "seed": options.seed,
                "sha256": clips.test.digest,
            },
        },
        performance=performance,
        requires={
            "onnx": "any ONNX Runtime with opset "
            f"{graphs.portable.opset}; checks numbers, runs everywhere",
            "tensorrt-onnx": f"TensorRT or TensorRT-RTX, opset {graphs.tensorrt.opset}",
        },
        notes=[
            "an engine runs only in the TensorRT-RTX version that built it; rebuild it from "
            "model.tensorrt.onnx elsewhere"
        ],
    )  # fmt: skip


_ROLES = {
    "plan.json": "plan", "plan.safetensors": "plan-tensors", "model.onnx": "onnx",
    "model.tensorrt.onnx": "tensorrt-onnx", "golden.npz": "golden", "proof.npz": "proof",
    "labels.txt": "labels", "report.json": "report", "report.html": "report-page",
}  # fmt: skip


def _role(name: str) -> str:
    if name.endswith(".engine"):
        return "engine"
    return _ROLES.get(name, "data")


def _roles(folder: Path) -> dict[str, str]:
    return {path.name: _role(path.name) for path in folder.iterdir()}


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
