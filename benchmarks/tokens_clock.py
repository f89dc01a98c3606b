"""Wall-clock time of reduced models against their operations; see `benchmarks/tokens.py`.

VideoMAE-B geometry (16 x 224 x 224, 1,568 tokens, 12 blocks of width 768), random weights: time
does not depend on what a model knows. Each schedule is exported to ONNX and run beside the model
without reduction in ONNX Runtime and in OpenVINO, all of them in turn.
- realised: (1 - time share) / (1 - share of the operations), by the formula.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vcompress.compress.tokens.shapes import Candidate, Fitter, Site
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.checkpoint import Checkpoint
from vcompress.models.load import ADAPTERS, LoadOptions, from_checkpoint
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.validate.latency import measure_interleaved

__all__ = ["RUNTIMES", "geometry", "measure", "table"]

SHARE = 0.5
# Few sites with many merges, and many sites with few.
SHAPES = {
    "one site, block 1": ((1, 0.5),),
    "two sites, blocks 1 and 4": ((1, 0.7), (4, 0.35)),
    "every block": tuple((block, 1 - 0.08 * block) for block in range(1, 12)),
}
_TECHNIQUE = "bipartite"
_WARM_UP = 2
Array = npt.NDArray[np.float32]


def measure(*, threads: int, rounds: int, attentions: Sequence[str]) -> dict[str, Any]:
    """Time all shapes with each of `attentions` in both runtimes."""
    model = geometry()
    fitter = Fitter(model)
    clip = model.example().numpy()
    with tempfile.TemporaryDirectory() as folder:
        files, shares = {"model": _exported(model, Path(folder) / "model.onnx")}, {}
        for name, shape in SHAPES.items():
            for attention in attentions:
                sites = tuple(Site(block, _TECHNIQUE, left) for block, left in shape)
                section = fitter.fit(Candidate(sites, attention), SHARE)
                assert section is not None
                reduced = model.copy()
                apply_reduction(reduced, section)
                label = f"{name}, {attention}"
                files[label] = _exported(reduced, Path(folder) / f"{len(files)}.onnx")
                shares[label] = fitter.share_of(section)
        rows = []
        for runtime, opener in RUNTIMES.items():
            runners = {label: opener(path, clip, threads) for label, path in files.items()}
            rows += _timed(runtime, runners, shares, rounds)
            print(*rows[-len(shares) :], sep="\n", flush=True)
    return {"geometry": dict(model.config), "rows": rows}


def geometry() -> VideoModel:
    """VideoMAE-B with random weights."""
    config = {
        "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16,
        "tubelet_size": 2, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 400,
    }  # fmt: skip
    torch.manual_seed(0)
    adapter = next(adapter for adapter in ADAPTERS if adapter.family == "videomae")
    state = adapter.build(config).state_dict()
    stored = Checkpoint(family="videomae", config=config, state_dict=state)
    return from_checkpoint(
        stored, name="videomae-b", source="random weights", options=LoadOptions()
    )


def _exported(model: VideoModel, path: Path) -> Path:
    export_onnx(
        PrimaryOutput(model.module), model.example(), path, dialect="portable",
        dynamic_batch=False,
    )  # fmt: skip
    return path


def _onnxruntime(path: Path, data: Array, threads: int) -> Callable[[], object]:
    return partial(open_session(path, threads=threads).run, data)


def _openvino(path: Path, data: Array, threads: int) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda: request.infer([data])


Opener = Callable[[Path, Array, int], Callable[[], object]]
RUNTIMES: dict[str, Opener] = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}


def _timed(
    runtime: str, runners: dict[str, Callable[[], object]], shares: dict[str, float], rounds: int
) -> list[dict[str, Any]]:
    timed = measure_interleaved(runners, warm_up=_WARM_UP, rounds=rounds)
    rows = []
    for label, share in shares.items():
        speed = timed[label].speed
        assert speed is not None
        rows.append({
            "runtime": runtime, "schedule": label, "flop_share": share,
            "model_p50_ms": timed["model"].p50_ms, "p50_ms": timed[label].p50_ms,
            "speed_ratio": speed.median, "speed_ratio_lower": speed.lower,
            "speed_ratio_upper": speed.upper,
            "realised": (1 - 1 / speed.median) / (1 - share),
        })  # fmt: skip
    return rows


def table(entries: dict[str, Any]) -> str:
    """Schedules x runtimes, in Markdown."""
    lines: list[str] = []
    for name, entry in entries.items():
        device = entry["device"]
        lines += [
            f"{name}, {device['num_threads']} threads of {device['cpu']}",
            "",
            "| runtime | schedule | operations | speed | realised |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['runtime']} | {row['schedule']} | {row['flop_share']:.3f} | "
            f"{row['speed_ratio']:.2f}x [{row['speed_ratio_lower'] or 0:.2f}, "
            f"{row['speed_ratio_upper'] or 0:.2f}] | {100 * row['realised']:.0f} % |"
            for row in entry["rows"]
        ]
        lines.append("")
    return "\n".join(lines)
