"""How long an NVFP4 engine of VideoMAE-B takes to build for SM120, on a machine without a GPU.

    python benchmarks/engine_build.py                 builds, and stores the seconds

16 x 224 x 224, 1,568 tokens, 12 blocks of width 768: every linear layer in NVFP4 (W4A4), the
convolution of the patches in INT8. The weights are random; zeros would be packed away.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vcompress
from vcompress.compress.frozen import freeze
from vcompress.export.engine import build_engine
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.models.load import ADAPTERS
from vcompress.models.video import PrimaryOutput
from vcompress.validate.latency import describe_device

__all__ = ["GEOMETRY", "write_graph"]

RESULTS = Path(__file__).parent / "results" / "engine_build.json"
GEOMETRY: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_channels": 3, "num_frames": 16, "tubelet_size": 2,
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "num_labels": 400,
}  # fmt: skip
_SM = "120"
_FORMATS: dict[type[nn.Module], str] = {nn.Linear: "nvfp4", nn.Conv3d: "int8"}


def write_graph(path: Path) -> GraphFacts:
    """The graph for TensorRT, from a model with random weights."""
    (adapter,) = (each for each in ADAPTERS if each.family == "videomae")
    # Without initialization, which takes longer than everything else.
    with torch.device("meta"):
        module = adapter.build(GEOMETRY)
    module.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.uniform_(-0.05, 0.05)
    for name, layer in list(module.named_modules()):
        if type(layer) in _FORMATS:
            module.set_submodule(name, freeze(layer, _FORMATS[type(layer)], 4.0))
    clip = torch.zeros(1, 16, 3, 224, 224)
    return export_onnx(
        PrimaryOutput(module), clip, path, dialect="tensorrt", dynamic_batch=False
    )  # fmt: skip


def main() -> None:
    """Build, store, print."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.perf_counter()
        graph = write_graph(path)
        middle = time.perf_counter()
        engine = build_engine(path, path.with_suffix(".engine"), sm=_SM)
        end = time.perf_counter()
    results = {
        "command": "python benchmarks/engine_build.py",
        "device": describe_device(torch.get_num_threads()),
        "versions": {"vcompress": vcompress.__version__, "tensorrt_rtx": engine.version},
        "geometry": GEOMETRY, "sm": _SM, "export_seconds": middle - start,
        "engine_seconds": end - middle, "onnx_bytes": graph.num_bytes,
        "engine_bytes": engine.num_bytes,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"exported in {middle - start:.1f} s, built for SM{_SM} in {end - middle:.1f} s")


if __name__ == "__main__":
    main()
