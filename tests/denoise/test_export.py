"""Denoisers export with named inputs, and the file computes what the module computes.

All classes are exported by `benchmarks/denoisers.py`; here is the one that needs the most: masks
filled into masks, times and guidance in the thousands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vcompress.calib.calls import load_calls
from vcompress.compress.frozen import freeze
from vcompress.export.graph import export_onnx
from vcompress.export.readback import read_precision
from vcompress.export.runtime import open_session
from vcompress.models.calls import Call, take_rows
from vcompress.models.load import wrap_denoiser
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.proof import run_session

# What diffusers and torch say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def quantize(model: VideoModel) -> dict[str, str]:
    """Freeze the layers of `model` in place, in three formats in turn; formats by layer."""
    formats = {}
    for index, (name, facts) in enumerate(model.layers.items()):
        format = ("nvfp4", "int8", "fp8")[index % 3]
        if facts.objection(format) is None:
            parent, _, child = name.rpartition(".")
            setattr(model.layer(parent), child, freeze(model.layer(name), format, 4.0))
            formats[name] = format
    return formats


def difference(model: VideoModel, path: Path, call: Call) -> float:
    """Relative L2 difference of the file's output from the module's."""
    expected, output = model(call).numpy(), run_session(open_session(path), call)
    assert output.shape == expected.shape
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


def test_the_file_computes_what_the_module_computes(zoo: Any, tmp_path: Path) -> None:
    name = "HunyuanVideoTransformer3DModel"
    model, path = zoo.shallow(name), tmp_path / "model.onnx"
    formats = quantize(model)
    example = model.example()
    assert isinstance(example, Call)
    module = PrimaryOutput(model.module, example)
    facts = export_onnx(module, example, path, dialect="portable", dynamic_batch=False)
    assert list(facts.inputs) == list(example.flat)
    # Two calls at once, of other latents, time and length of text than the example.
    for batch in load_calls(zoo.calls(name))[3:7].tensors(2):
        assert difference(model, path, batch) < 1e-3
    found = read_precision(path, prefix="model.").formats
    assert {layer: found.get(layer) for layer in formats} == formats
    # What a graph of fixed shapes does not have.
    operators = {node.op_type for node in onnx.load(path).graph.node}
    banned = {"NonZero", "Loop", "If"}
    assert sorted(operators & banned) == []


class Shared(nn.Module):
    """Takes a table that has no row a sample, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], scale: float = 1.0
    ) -> tuple[torch.Tensor]:
        return (self.layer(x * table[0] + table[1]) * scale,)


def test_what_calls_share_has_no_batch_axis_in_the_file(tmp_path: Path) -> None:
    call = Call(
        tensors={"x": torch.randn(1, 5, 8)},
        shared={"table.0": torch.randn(5, 8), "table.1": torch.randn(5, 8)},
        constants={"scale": 3.0},
    )
    model = wrap_denoiser(Shared(), name="shared", call=call)
    path = tmp_path / "model.onnx"
    module = PrimaryOutput(model.module, call)
    facts = export_onnx(module, call, path, dialect="portable")
    assert facts.inputs == {"x": ("batch", 5, 8), "table.0": (5, 8), "table.1": (5, 8)}
    assert difference(model, path, take_rows(call, [0, 0, 0])) < 1e-6
    facts = export_onnx(module, call, path, dialect="portable", dynamic_batch=False)
    assert facts.inputs["x"] == (1, 5, 8)
    # One sample after the other.
    assert difference(model, path, take_rows(call, [0, 0, 0])) < 1e-6
