"""How fast an INT8 artifact runs on a CPU, beside OpenVINO with NNCF and ONNX Runtime's own INT8.

    pip install nncf==3.4.0                                   # the peer
    python benchmarks/cpu_runtime.py                          # makes the files, runs, stores
    python benchmarks/cpu_runtime.py --table

VideoMAE-S geometry: 16 x 224 x 224, 1,568 tokens, 12 blocks of width 384; batch 1, random weights
(time does not depend on what a model knows). All candidates run in turn in one process; each ratio
is the median over rounds of the paired ratios. The artifact is what `quantize --target int8
--attention int8_keep` and `export --runtime openvino` write: linears, the convolution, and the
queries and keys of attention in INT8; `int8_token` has input scales for each token in its place.
- NNCF gets the model in both forms that a user has, the ONNX file and the torch module (whose
  attention it sees as one operator); all bars are held against the faster one.
- OpenVINO computes in float32 what is left in floating point, which is what the artifact was proven
  with; or in bfloat16 (`bf16`), OpenVINO's own default on processors that have it.
- token schedules of `--schedules`: the share of the operations, and reductions in front of blocks.
- peaks: an INT8 and a float32 product of large matrices in OpenVINO, counted by operations.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import vcompress
from vcompress.compress.attention_plan import calibrate_attention
from vcompress.compress.attention_sites import apply_attention
from vcompress.compress.frozen import freeze
from vcompress.compress.tokens.shapes import Candidate, Fitter, Site
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.dialects.openvino import for_openvino
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.checkpoint import Checkpoint
from vcompress.models.load import ADAPTERS, LoadOptions, from_checkpoint
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.validate.latency import describe_device, measure_interleaved

RESULTS = Path(__file__).parent / "results" / "cpu_runtime.json"
GEOMETRY: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2,
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536, "num_labels": 400,
}  # fmt: skip
# Share of the operations -> the reductions that `tokens.py` finds for penvideo20 (0.43 and 1.39
# points lost, the latter with a refitted readout), as shares of the patches.
SCHEDULES: Mapping[float, tuple[tuple[int, str, float], ...]] = {
    0.5: ((0, "bipartite", 0.62), (1, "saliency", 0.49)),
    0.25: ((0, "detail", 0.32), (1, "grouped", 0.24)),
}
_ATTENTION = "int8_keep"
# Rows, inputs and outputs of the products that give the peaks.
_PEAK = (2048, 2048, 2048)
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Runner = Callable[[], object]


class _Clip:
    """The one clip of which ranges are taken."""

    def __init__(self, clip: torch.Tensor) -> None:
        self._clip = clip

    def tensors(self, _batch_size: int) -> Iterator[torch.Tensor]:
        yield self._clip


def geometry() -> VideoModel:
    """VideoMAE-S with random weights."""
    torch.manual_seed(0)
    adapter = next(adapter for adapter in ADAPTERS if adapter.family == "videomae")
    state = adapter.build(GEOMETRY).state_dict()
    stored = Checkpoint(family="videomae", config=GEOMETRY, state_dict=state)
    return from_checkpoint(stored, name="videomae-s", source="random", options=LoadOptions())


def quantized(model: VideoModel, clip: torch.Tensor, linears: str = "int8") -> VideoModel:
    """All layers in INT8, and scores of attention; ranges are those of `clip`.

    `linears` is the format of linear layers: `int8_token` has an input scale for each token.
    """
    changed = model.copy()
    ranges = calibrate_attention(changed, _Clip(clip))  # type: ignore[arg-type]
    apply_attention(
        changed.module,
        {name: each.choice(_ATTENTION, smooth_keys=False) for name, each in ranges.items()},
    )
    amax: dict[str, float] = {}
    hooks = [
        changed.layer(name).register_forward_pre_hook(
            lambda _, args, name=name: amax.__setitem__(name, float(args[0].abs().max()))
        )
        for name in changed.layers
    ]
    changed(clip)
    for hook in hooks:
        hook.remove()
    for name in changed.layers:
        layer = changed.layer(name)
        form = linears if isinstance(layer, nn.Linear) else "int8"
        changed.module.set_submodule(name, freeze(layer, form, amax[name]))
    return changed


def reduced(model: VideoModel, share: float) -> tuple[VideoModel, dict[str, Any]]:
    """The model with the schedule of `share`, and its section."""
    sites = tuple(Site(*site) for site in SCHEDULES[share])
    section = Fitter(model).fit(Candidate(sites, "proportional"), share)
    assert section is not None
    changed = model.copy()
    apply_reduction(changed, section)
    return changed, section.as_dict()


def write_graph(model: VideoModel, clip: torch.Tensor, folder: Path, name: str) -> dict[str, Path]:
    """The files of a model for ONNX Runtime and for OpenVINO; those that are there stay."""
    module = PrimaryOutput(model.module)
    paths = {}
    for dialect in ("portable", "tensorrt"):
        paths[dialect] = folder / f"{name}.{dialect}.onnx"
        if paths[dialect].is_file():
            continue
        export_onnx(module, clip, paths[dialect], dialect=dialect, dynamic_batch=False)
    paths["openvino"] = folder / f"{name}.openvino.onnx"
    onnx.save(for_openvino(onnx.load(paths["tensorrt"])), paths["openvino"])
    return paths


class _Logits(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(clips)
        return logits


def write_peers(model: VideoModel, float_path: Path, clip: torch.Tensor, folder: Path) -> None:
    """The files of NNCF, from ONNX and from torch, and of quantize_dynamic."""
    import nncf
    import openvino
    from onnxruntime.quantization import quantize_dynamic

    if not (folder / "dynamic.onnx").is_file():
        quantize_dynamic(float_path, folder / "dynamic.onnx")
    sources = {
        "nncf_onnx": openvino.Core().read_model(float_path),
        "nncf_torch": openvino.convert_model(
            _Logits(PrimaryOutput(model.module)), example_input=clip, input=[list(clip.shape)]
        ),
    }
    for name, source in sources.items():
        made = nncf.quantize(
            source, nncf.Dataset([clip.numpy()]), model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
        )  # fmt: skip
        openvino.save_model(made, folder / f"{name}.xml", compress_to_fp16=False)


def make_files(folder: Path) -> dict[str, Any]:
    """All files in `folder`; facts of the schedules."""
    model = geometry()
    clip = torch.randn(model.example().shape, generator=torch.Generator().manual_seed(1))
    np.save(folder / "clip.npy", clip.numpy())
    files = write_graph(model, clip, folder, "float")
    write_peers(model, files["portable"], clip, folder)
    write_graph(quantized(model, clip), clip, folder, "int8")
    write_graph(quantized(model, clip, "int8_token"), clip, folder, "int8_token")
    sections = {}
    for share in SCHEDULES:
        fewer, sections[str(share)] = reduced(model, share)
        write_graph(quantized(fewer, clip), clip, folder, f"int8_{share}")
    facts = {"geometry": GEOMETRY, "schedules": sections}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _onnxruntime(path: Path, clip: Array, threads: int) -> Runner:
    return partial(open_session(path, threads=threads).run, clip)


def _openvino(path: Path, clip: Array, threads: int, precision: str = "f32") -> Runner:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }  # fmt: skip
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda: request.infer([clip])


def runners(folder: Path, threads: int) -> dict[str, Runner]:
    """All candidates by name."""
    clip = np.load(folder / "clip.npy")
    found = {
        "ours int8, ONNX Runtime": _onnxruntime(folder / "int8.portable.onnx", clip, threads),
        "float, ONNX Runtime": _onnxruntime(folder / "float.portable.onnx", clip, threads),
        "quantize_dynamic, ONNX Runtime": _onnxruntime(folder / "dynamic.onnx", clip, threads),
        "float, OpenVINO f32": _openvino(folder / "float.openvino.onnx", clip, threads),
    }
    for precision in ("f32", "bf16"):
        for name in ("nncf_onnx", "nncf_torch"):
            path = folder / f"{name}.xml"
            found[f"{name}, OpenVINO {precision}"] = _openvino(path, clip, threads, precision)
        found[f"ours int8, OpenVINO {precision}"] = _openvino(
            folder / "int8.openvino.onnx", clip, threads, precision
        )
        found[f"ours int8_token, OpenVINO {precision}"] = _openvino(
            folder / "int8_token.openvino.onnx", clip, threads, precision
        )
        for share in SCHEDULES:
            found[f"ours int8 and tokens {share}, OpenVINO {precision}"] = _openvino(
                folder / f"int8_{share}.openvino.onnx", clip, threads, precision
            )
    return found


def peaks(threads: int) -> dict[str, float]:
    """Operations a second of large products, in INT8 and in float32."""
    rows, inputs, outputs = _PEAK
    found = {}
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("int8", "float32"):
            layer: nn.Module = nn.Linear(inputs, outputs, bias=False).eval()
            layer = freeze(layer, "int8", 4.0) if name == "int8" else layer
            paths = Path(folder) / f"{name}.onnx"
            export_onnx(layer, x, paths, dialect="tensorrt", dynamic_batch=False)
            run = _openvino(paths, x.numpy(), threads)
            timed = measure_interleaved({name: run}, warm_up=2, rounds=10)
            found[name] = 2.0 * rows * inputs * outputs / (timed[name].p50_ms / 1000)
    return found


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of all candidates, and paired ratios to each peer."""
    found = runners(folder, threads)
    # The peak twice, before and after, since other work may come in between.
    before = peaks(threads)
    timed = measure_interleaved(found, warm_up=2, rounds=rounds)
    after = peaks(threads)
    return {
        "p50_ms": {name: each.p50_ms for name, each in timed.items()},
        "minimum_ms": {name: each.min_ms for name, each in timed.items()},
        "operations_per_second": {name: max(before[name], after[name]) for name in before},
    }


def table(results: Mapping[str, Any]) -> str:
    """Candidates beside the faster NNCF and quantize_dynamic, in Markdown."""
    times = results["p50_ms"]
    lines = [
        "| candidate | median ms | beside NNCF, float32 | beside NNCF, bfloat16 | "
        "beside quantize_dynamic |",
        "|---|---|---|---|---|",
    ]
    peers = [
        min(value for name, value in times.items() if name.startswith("nncf") and kind in name)
        for kind in ("f32", "bf16")
    ]
    peers.append(times["quantize_dynamic, ONNX Runtime"])
    for name, value in sorted(times.items(), key=lambda each: -each[1]):
        ratios = " | ".join(f"{peer / value:.2f}x" for peer in peers)
        lines.append(f"| {name} | {value:.1f} | {ratios} |")
    rates = results["operations_per_second"]
    lines += ["", *(f"{name}: {rate / 1e9:.0f} G operations/s" for name, rate in rates.items())]
    return "\n".join(lines)


def main() -> None:
    """Make the files, run, store, print."""
    parser = argparse.ArgumentParser(description="INT8 on a CPU beside its peers.")
    parser.add_argument("--folder", type=Path, help="keep the files there and use them again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--make", action="store_true", help="only make the files")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.results.read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "facts.json").is_file():
            make_files(folder)
        if arguments.make:
            return
        results = {
            "command": f"python benchmarks/cpu_runtime.py --rounds {arguments.rounds}",
            "device": describe_device(arguments.threads),
            "versions": {
                "vcompress": vcompress.__version__,
                **{name: metadata.version(name)
                   for name in ("torch", "onnxruntime", "openvino", "nncf")},
            },
            **json.loads((folder / "facts.json").read_text(encoding="utf-8")),
            **measure(folder, arguments.threads, arguments.rounds),
        }  # fmt: skip
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
