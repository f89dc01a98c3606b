"""What a finished run leaves on record: the report and the manifest, from what was measured."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vcompress
from vcompress.calib.sources import ClipSets
from vcompress.compress.frozen import FrozenLayer
from vcompress.compress.tokens.flops import ScheduleCost, counts_of
from vcompress.export.graph import GraphFacts
from vcompress.export.manifest import build_manifest
from vcompress.models.video import VideoModel
from vcompress.pipeline import proof as proving
from vcompress.pipeline.run import Options
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.token_section import TokenSection
from vcompress.validate import latency, report
from vcompress.validate.gate import Verdict
from vcompress.validate.report_types import Engine, Generation, Layer, Report, Search, Tokens

__all__ = ["Run", "file_role", "manifest_of", "report_of"]

_PACKAGES = (
    "onnx", "onnxruntime", "onnxruntime-gpu", "transformers", "nvidia-modelopt",
    "tensorrt-rtx-cu13", "av", "numpy",
)  # fmt: skip
_ROLES = {
    "plan.json": "plan", "plan.safetensors": "plan-tensors", "model.onnx": "onnx",
    "model.tensorrt.onnx": "tensorrt-onnx", "golden.npz": "golden", "proof.npz": "proof",
    "weights.safetensors": "weights", "config.json": "config",
    "labels.txt": "labels", "report.json": "report", "report.html": "report-page",
    "cache.html": "cache-page", "precision.html": "precision-page",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run decided, made and measured."""

    model: VideoModel
    planned: VideoModel
    plan: CompressionPlan
    clips: ClipSets
    options: Options
    proof: proving.Proof
    max_drop_points: float | None
    verdict: Verdict
    engines: list[Engine]
    warnings: list[str]


def file_role(name: str) -> str:
    """The role of a file of the artifact, by its name."""
    return "engine" if name.endswith(".engine") else _ROLES.get(name, "data")


def _parameter_bits(module: torch.nn.Module) -> int:
    return sum(8 * p.numel() * p.element_size() for p in module.parameters())


def _planned_bits(planned: VideoModel) -> int:
    """Bits of all weights: frozen ones with their scales, the rest as they are."""
    bits = _parameter_bits(planned.module)
    for module in planned.module.modules():
        if isinstance(module, FrozenLayer):
            bits += sum(
                8 * each.numel() * each.element_size() for each in module.state_dict().values()
            )
    return bits


def _layer_rows(model: VideoModel, planned: VideoModel, plan: CompressionPlan) -> list[Layer]:
    rows: list[Layer] = []
    for name, choice in plan.quantize.items():
        layer = planned.layer(name)
        weight = model.layer(name).weight
        assert isinstance(weight, torch.Tensor)
        bits = (
            layer.weight_bits + layer.extra_bits
            if isinstance(layer, FrozenLayer)
            else 8 * weight.numel() * weight.element_size()
        )
        rows.append(
            Layer(
                name=name, format=choice.format, score=choice.score, reason=choice.reason,
                weight_kib=bits / 8192, block=model.block_of(name),
            )
        )  # fmt: skip
    for name, products in (plan.attention or {}).items():
        # Nothing is stored, so that effective bits stay what they are.
        rows.append(
            Layer(
                name=f"{name} (QK, PV)", format=products.format, score=products.score,
                reason=products.reason, weight_kib=0.0, block=model.block_of(f"{name}."),
            )
        )  # fmt: skip
    return rows


def _token_rows(model: VideoModel, section: TokenSection) -> Tokens:
    counts = counts_of(section, model.token_blocks)
    return {
        "attention": section.attention,
        "num_patches_baseline": section.num_patches,
        "num_patches_result": counts[-1],
        "flop_share": ScheduleCost.of(model).share(counts),
        "blocks": [
            {
                "block": block,
                "num_patches": count,
                "technique": section.sites[block].technique if block in section.sites else None,
            }
            for block, count in zip(model.token_blocks, counts, strict=True)
        ],
    }


def _search(plan: CompressionPlan) -> Search | None:
    """What the plan says of its search; None without one, or of an earlier version."""
    found = plan.evidence.get("search")
    if not isinstance(found, dict) or "trade_off" not in found:
        return None
    return {
        "loss": str(found["loss"]), "points": found["trade_off"],
        "bits": found["bits"], "predicted_loss": found["predicted_loss_if_additive"],
        "calibration_loss": found["calibration_loss"],
    }  # fmt: skip


def _generation(plan: CompressionPlan, min_psnr_db: float | None) -> Generation | None:
    """What the plan does from step to step; None where every step is the same."""
    cache, dynamic = (plan.evidence.get(name, {}) for name in ("cache", "dynamic_precision"))
    if not (cache or dynamic or plan.cache or plan.dynamic_precision):
        return None
    held_out: dict[str, Any] = cache.get("held_out", {})
    changed: dict[str, Any] = dynamic.get("held_out", {})
    speed = cache.get("speed_up")
    skipped, four_bits = held_out.get("skip_rate"), changed.get("share")
    return {
        "num_steps": None if plan.cache is None else plan.cache.num_steps,
        "cache_policy": None if plan.cache is None else plan.cache.policy,
        "cache_reason": cache.get("reason"),
        "skip_percent": None if skipped is None else 100 * skipped,
        "speed_ratio": statistics.median(speed) if speed else None,
        "four_bit_percent": None if four_bits is None else 100 * four_bits,
        "precision_reason": dynamic.get("reason"),
        "psnr_db": held_out.get("psnr_db", changed.get("psnr_db")),
        "precision_alone_psnr_db": cache.get("precision_alone", {}).get("psnr_db"),
        "min_psnr_db": min_psnr_db,
    }


def report_of(run: Run, folder: Path) -> Report:
    """The report of `run`, whose files lie in `folder`."""
    model, planned, plan, clips = run.model, run.planned, run.plan, run.clips
    parameters = sum(p.numel() for p in model.module.parameters())
    baseline_bits, planned_bits = _parameter_bits(model.module), _planned_bits(planned)
    return report.build_report(
        vcompress=vcompress.__version__,
        created=_now(),
        command=run.options.command or shlex.join(["vcompress", *sys.argv[1:]]),
        seed=plan.seed,
        target=plan.target,
        model={
            "name": model.name, "family": model.family, "task": model.task,
            "weights_sha256": model.weights_sha256, "num_parameters": parameters,
            "num_classes": (
                run.proof.baseline_outputs.shape[-1] if model.task == "classify" else None
            ),
        },
        verdict=run.verdict,
        result_stage=proving.RESULT,
        stages=run.proof.stages,
        sizes={
            "baseline_weights_mib": baseline_bits / 8 / 2**20,
            "result_weights_mib": planned_bits / 8 / 2**20,
            "files": [
                {"path": path.name, "role": file_role(path.name), "bytes": path.stat().st_size}
                for path in sorted(folder.iterdir())
            ],
        },
        precision={
            "baseline_effective_bits": baseline_bits / parameters,
            "result_effective_bits": planned_bits / parameters,
            "read_back_from": "model.onnx",
        },
        layers=_layer_rows(model, planned, plan),
        tokens=None if plan.tokens is None else _token_rows(model, plan.tokens),
        search=_search(plan),
        generation=_generation(plan, run.options.min_psnr),
        engines=run.engines,
        clips={
            "test": {
                "source": clips.test_source, "num_clips": len(clips.test),
                "sha256": clips.test.digest,
            },
            "calibration": {
                "source": str(run.options.calib), "num_clips": len(clips.calibration),
                "sha256": clips.calibration.digest,
            },
            "skipped": [{"name": name, "reason": reason} for name, reason in clips.skipped],
        },
        device=latency.describe_device(torch.get_num_threads()),
        versions=_versions(),
        warnings=run.warnings,
    )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def manifest_of(
    run: Run, made: Report, portable: GraphFacts, tensorrt: GraphFacts
) -> dict[str, Any]:
    """The manifest of `run` without the files, from its report and its graphs."""
    model, clips, options, proof = run.model, run.clips, run.options, run.proof
    result = next(stage for stage in made["stages"] if stage["name"] == proving.RESULT)
    performance = []
    if result["latency"] is not None:
        performance.append(
            {"file": "model.onnx", "runtime": result["runtime"], "batch": 1, **result["latency"]}
        )
    classify = model.task == "classify" and clips.test.labels is not None
    return build_manifest(
        model, run.plan, portable,
        created=made["created"],
        effective_bits=round(made["precision"]["result_effective_bits"], 4),
        quality={
            "metric": "top1_percent" if classify else "sqnr_db",
            "baseline": proof.metrics.get("baseline_top1_percent") if classify else None,
            "result": proof.metrics.get("top1_percent" if classify else "sqnr_db"),
            "verdict": made["verdict"]["outcome"],
            "max_drop_points": run.max_drop_points,
            "min_sqnr_db": options.min_sqnr,
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
            f"{portable.opset}",
            "tensorrt-onnx": f"TensorRT or TensorRT-RTX, opset {tensorrt.opset}",
        },
        notes=[
            "an engine runs only in the TensorRT-RTX version that built it; rebuild it from "
            "model.tensorrt.onnx elsewhere"
        ],
    )  # fmt: skip
