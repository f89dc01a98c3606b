"""A report as a real run gives it: the metrics, parity and latency are computed, not typed in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vcompress.validate.gate import judge
from vcompress.validate.latency import describe_device, measure_interleaved
from vcompress.validate.metrics import compare_outputs
from vcompress.validate.parity import check_parity
from vcompress.validate.report import build_report, build_stage
from vcompress.validate.report_types import Layer, Report, TokenBlock

ROLES = (
    "attention.query", "attention.key", "attention.value", "attention.output",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip


def make_layers(num_blocks: int = 12) -> list[Layer]:
    """A plan as the sensitivity measure makes it: a few layers cannot bear four bits."""
    rng = np.random.default_rng(7)
    layers = [
        Layer(
            name="embeddings.patch_embeddings.projection", format="int8", score=0.031, block=None,
            reason="nvfp4 is defined for linear layers, not conv3d", weight_kib=432.0,
        )
    ]  # fmt: skip
    for block in range(num_blocks):
        for role in ROLES:
            score = float(rng.lognormal(-5.2, 0.9)) * (3.0 if role == "mlp.fc2" else 1.0)
            choice = "nvfp4" if score < 0.02 else "int8"
            reason = (
                "within the budget"
                if choice == "nvfp4"
                else (f"nvfp4 would cost {score:.3f} of its block's output, the bar is 0.02")
            )
            weight = 324.0 * (4 if role.startswith("mlp") else 1)
            layers.append(Layer(
                name=f"encoder.layer.{block}.{role}", format=choice, score=score, reason=reason,
                weight_kib=weight * (0.5 if choice == "nvfp4" else 1.0),
            ))  # fmt: skip
    layers.append(Layer(
        name="classifier", format="keep", score=0.41, block=None,
        reason="the last layer is kept: nvfp4 would cost 0.410 of the logits", weight_kib=45.0,
    ))  # fmt: skip
    return layers


def make_report(*, noise: float = 0.3, max_drop: float | None = 2.0, tokens: bool = True,
                num_clips: int = 1500, labelled: bool = True) -> Report:  # fmt: skip
    """Logits with quantization noise, judged, timed and checked by the product's own code."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 20, num_clips)
    baseline = rng.standard_normal((num_clips, 20)).astype(np.float32)
    baseline[np.arange(num_clips), labels] += 4.5
    planned = baseline + (noise * rng.standard_normal(baseline.shape)).astype(np.float32)
    exported = planned + (1e-6 * rng.standard_normal(planned.shape)).astype(np.float32)
    known = labels if labelled else None
    weight = rng.standard_normal((256, 256)).astype(np.float32)
    values = rng.standard_normal(200_000)
    times = measure_interleaved(
        {"ONNX baseline": lambda: np.sort(values), "ONNX, portable": lambda: np.sort(values[::2])},
        warm_up=3, rounds=60,
    )  # fmt: skip
    clips = [rng.standard_normal((8, 256)).astype(np.float32) for _ in range(2)]
    parity = check_parity(
        lambda x: x @ weight, lambda x: (x.astype(np.float64) @ weight).astype(np.float32), clips,
        tolerance=1e-3,
    )  # fmt: skip
    task = "classify"
    result = compare_outputs(baseline, exported, labels=known, task=task)
    stages = [
        build_stage(
            "baseline", about="the model as it was loaded", runtime="torch, float32",
            metrics=compare_outputs(baseline, baseline, labels=known, task="classify"),
            latency_reason="timed as ONNX, in the runtime of the result",
        ),
        build_stage(
            "planned", about="every decision of the plan, simulated", runtime="torch, float32",
            metrics=compare_outputs(baseline, planned, labels=known, task="classify"),
            latency_reason="simulated: the formats are computed in float32",
        ),
        build_stage(
            "ONNX baseline", about="the unquantized graph", runtime="ONNX Runtime, CPU",
            metrics=compare_outputs(baseline, baseline, labels=known, task="classify"),
            parity=parity, latency=times["ONNX baseline"], batch_size=1,
        ),
        build_stage(
            "ONNX, portable", about="the quantized graph", runtime="ONNX Runtime, CPU",
            metrics=result, parity=parity, latency=times["ONNX, portable"], batch_size=1,
            metrics_versus_previous=compare_outputs(planned, exported, labels=None, task=task),
        ),
        build_stage(
            "TensorRT-RTX engine", about="built for SM120",
            metrics_reason="built, not run: this machine has no GPU",
            latency_reason="built, not run: this machine has no GPU",
        ),
    ]  # fmt: skip
    layers = make_layers()
    in_layers_mib = sum(layer["weight_kib"] for layer in layers) / 1024
    token_blocks: list[TokenBlock] = [
        {"block": f"encoder.layer.{i}", "num_patches": 1568 - 96 * max(0, i - 1),
         "technique": "bipartite" if i >= 2 else None}
        for i in range(12)
    ]  # fmt: skip
    return build_report(
        vcompress="0.1.0", created="2026-11-22T10:00:00Z", seed=0, target="nvfp4",
        command="vcompress quantize videomae.safetensors --target nvfp4 --calib clips/ "
                "--max-drop 2.0 --output videomae-nvfp4/",
        model={"name": "videomae-small", "family": "videomae", "task": "classify",
               "weights_sha256": "9f2c" * 16, "num_parameters": 21_947_156, "num_classes": 20},
        verdict=judge(result, max_drop_points=max_drop),
        result_stage="ONNX, portable", stages=stages,
        sizes={"baseline_weights_mib": 83.72, "result_weights_mib": in_layers_mib + 2.6,
               "files": [{"path": "model.onnx", "role": "onnx", "bytes": 14_812_331},
                         {"path": "model.engine", "role": "engine", "bytes": 15_004_992},
                         {"path": "plan.json", "role": "plan", "bytes": 11_902}]},
        precision={"baseline_effective_bits": 32.0, "result_effective_bits": 5.4123,
                   "read_back_from": "model.onnx"},
        layers=layers,
        clips={"test": {"source": "test", "num_clips": num_clips, "sha256": "ab" * 32},
               "calibration": {"source": "clips/", "num_clips": 64, "sha256": "cd" * 32},
               "skipped": [{"name": "clips/broken.mp4", "reason": "truncated after 3 frames"}]},
        device=describe_device(2),
        versions={"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.24.1"},
        tokens={"attention": "plain", "num_patches_baseline": 1568,
                "num_patches_result": 1568 - 960, "flop_share": 0.69,
                "blocks": token_blocks} if tokens else None,
        engines=[
            {"runtime": "TensorRT-RTX", "sm": "120", "status": "built", "seconds": 21.4,
             "bytes": 15_004_992, "reason": None},
            {"runtime": "TensorRT", "sm": None, "status": "not built", "seconds": None,
             "bytes": None, "reason": "needs a GPU; build it where the engine will run",
             "command": "trtexec --onnx=model.onnx --saveEngine=model.engine"},
        ],
        warnings=["64 calibration clips were asked for, 63 could be used"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def report() -> Report:
    """The report of a run that went well."""
    return make_report()


@pytest.fixture(scope="session")
def report_maker() -> Callable[..., Report]:
    """The function that makes other reports."""
    return make_report
