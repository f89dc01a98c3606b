"""The manifest of an artifact: all that an edge device needs, without the key `files`.

Field names follow `docs/artifact.md`; the same facts go into the ONNX files' metadata, where ONNX
Runtime and OpenVINO can read them. Nothing is ever prefixed to an engine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vcompress
from vcompress.spec.artifact import SCHEMA
from vcompress.spec.call import CallSpec
from vcompress.spec.clip import ClipSpec
from vcompress.spec.plan import CompressionPlan

if TYPE_CHECKING:
    # They import torch, which a device that only builds engines does without.
    from vcompress.export.graph import GraphFacts
    from vcompress.models.video import VideoModel

__all__ = ["GOLDEN_INPUTS", "INPUT_NAME", "OUTPUT_NAME", "build_manifest", "onnx_metadata"]

INPUT_NAME = "pixel_values"
OUTPUT_NAME = "output"
# In golden.npz: the clips, or before the dot and the name of each tensor of the calls.
GOLDEN_INPUTS = "inputs"


def onnx_metadata(model: VideoModel, plan: CompressionPlan) -> dict[str, str]:
    """`metadata_props` of the ONNX files: JSON under the one key `vcompress`."""
    facts = {
        "schema": SCHEMA,
        "vcompress": vcompress.__version__,
        "name": model.name,
        "task": model.task,
        "target": plan.target,
        "clip": _clip(model),
        "labels": list(model.labels),
    }
    return {"vcompress": json.dumps(facts)}


def build_manifest(
    model: VideoModel, plan: CompressionPlan, graph: GraphFacts, *,
    created: str, effective_bits: float, quality: Mapping[str, Any],
    performance: list[dict[str, Any]], requires: Mapping[str, str], notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest without `files`, which `publish.write_manifest` adds.

    Args:
        graph: facts of the portable graph.
        quality: the metric, baseline and result, number of clips, and which clips they are.
        performance: measured latencies; empty where nothing could be measured.
        requires: what runs each file, by role.
    """
    return {
        "schema": SCHEMA,
        "vcompress": vcompress.__version__,
        "created": created,
        "name": model.name,
        "source": {
            "id": model.source, "family": model.family, "weights_sha256": model.weights_sha256,
        },
        "task": model.task,
        "labels": "labels.txt" if model.labels else None,
        "inputs": _inputs(model, graph),
        "outputs": [
            {"name": OUTPUT_NAME, "dtype": "float32", "shape": list(graph.output_shape)}
        ],
        "clip": _clip(model),
        "call": model.inputs.as_dict() if isinstance(model.inputs, CallSpec) else None,
        "precision": {
            "target": plan.target,
            "effective_bits": effective_bits,
            "layers": dict(Counter(choice.format for choice in plan.quantize.values())),
            "plan": "plan.json",
            "verified_from": "model.onnx",
        },
        "golden": {
            "file": "golden.npz", "inputs": GOLDEN_INPUTS, "outputs": "outputs",
            "metric": "relative_l2", "max": 0.05,
        },
        "quality": dict(quality),
        "performance": performance,
        "requires": dict(requires),
        "notes": notes,
    }  # fmt: skip


def _clip(model: VideoModel) -> dict[str, Any] | None:
    return model.inputs.as_dict() if isinstance(model.inputs, ClipSpec) else None


def _inputs(model: VideoModel, graph: GraphFacts) -> list[dict[str, Any]]:
    if isinstance(model.inputs, ClipSpec):
        layout, dtype = model.inputs.layout, model.inputs.dtype
        shape = list(graph.input_shape)
        return [{"name": INPUT_NAME, "dtype": dtype, "layout": layout, "shape": shape}]
    return [
        {
            "name": one.name, "dtype": one.dtype, "layout": None,
            "shape": list(graph.inputs[one.name]),
        }
        for one in model.inputs.tensors
    ]  # fmt: skip
