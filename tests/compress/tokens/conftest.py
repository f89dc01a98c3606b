"""Small models with random weights, and what a graph must be for TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from vcompress.export.engine import build_engine
from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import VideoModel


@pytest.fixture(scope="session")
def tiny() -> Callable[..., VideoModel]:
    """A VideoMAE or a ViViT of three blocks and 32 patches (2 x 4 x 4)."""

    def build(family: str, **changes: int) -> VideoModel:
        torch.manual_seed(0)
        adapter = next(adapter for adapter in load.ADAPTERS if adapter.family == family)
        config = {
            "image_size": 32, "patch_size": 8, "num_channels": 3, "num_frames": 4,
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 64, "num_labels": 5,
            "tubelet_size": 2 if family == "videomae" else [2, 8, 8], **changes,
        }  # fmt: skip
        state = adapter.build(config).state_dict()
        checkpoint = load.checkpoints.Checkpoint(family=family, config=config, state_dict=state)
        return load.from_checkpoint(checkpoint, name=family, source=family, options=LoadOptions())

    return build


def objections_of_tensorrt(path: Path) -> list[str]:
    """Nodes of a graph that TensorRT cannot take, or only with a plugin."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            (value,) = (field.t for field in node.attribute)
            constants[node.output[0]] = numpy_helper.to_array(value)
    found = []
    for node in graph.node:
        reductions = {field.s for field in node.attribute if field.name == "reduction"} - {b"none"}
        if node.op_type in {"NonZero", "Loop", "If", "Scan", "RandomNormal"}:
            found.append(f"{node.op_type} {node.name}: shapes or order depend on data")
        elif node.op_type.startswith("Scatter") and reductions:
            found.append(f"{node.op_type} {node.name}: adds up")
        elif node.op_type == "TopK" and int(constants[node.input[1]].item()) > 3840:
            found.append(f"TopK {node.name}: gives more than 3840 back")
    return found


@pytest.fixture(scope="session")
def builds_in_tensorrt() -> Callable[..., None]:
    """Checks a graph, its nodes first, and builds it; `also` names nodes that must not be there."""

    def check(path: Path, also: Collection[str] = ("ScatterElements", "ScatterND")) -> None:
        assert not objections_of_tensorrt(path)
        assert not {node.op_type for node in onnx.load(path).graph.node} & set(also)
        assert build_engine(path, path.with_suffix(".engine")).num_layers > 0

    return check
