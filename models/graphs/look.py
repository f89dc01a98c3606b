"""What an ONNX file holds, as `inspect` tells it: nothing is run but the graph, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcompress.models.graphs.onnx_file import read_onnx
from vcompress.models.graphs.source import graph_of_onnx
from vcompress.models.look import FoundModel
from vcompress.models.structure import find_layers
from vcompress.spec.plan import LayerFacts

__all__ = ["FoundGraph", "look_at_onnx"]


@dataclass(frozen=True, kw_only=True)
class FoundGraph:
    """A graph that can be compressed: `model` in brief, and its `layers` by full name."""

    model: FoundModel
    layers: Mapping[str, LayerFacts]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        layers = {
            name: {"kind": facts.kind, "weight_shape": list(facts.weight_shape)}
            for name, facts in self.layers.items()
        }
        return {"models": [self.model.as_dict()], "layers": layers}


def look_at_onnx(path: Path) -> FoundGraph:
    """The layers and blocks that `path` would be compressed by.

    Raises:
        InputError: it cannot be; see `source.load_graph`.
    """
    file = read_onnx(path)
    graph = graph_of_onnx(file)
    layers = find_layers(graph.module, {name for name, _ in graph.module.named_modules()})
    clip = graph.clip
    sizes = ", ".join(("batch", *map(str, clip.input_shape)))
    model = FoundModel(
        path=str(path), family=f"ONNX, opset {file.opset}",
        num_parameters=sum(one.numel() for one in graph.module.parameters()),
        layers=dict(Counter(facts.kind for facts in layers.values())), blocks=graph.blocks,
        inputs=f"{clip.layout} {clip.dtype} [{sizes}]",
    )  # fmt: skip
    return FoundGraph(model=model, layers=layers)
