"""A graph that was exported for one batch size, made to take any.

Exporters write the sizes of a fixed batch into every reshape. The first size is put back as -1,
"whatever is left", which is right wherever the batch is the first axis or the outer part of it.
Whether that is so everywhere is tried with two clips; where it is not (a batch behind the tokens,
statistics over clips), the graph stays as it is, and larger batches run in parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from vcompress.models.graphs.operators import compute

if TYPE_CHECKING:
    from vcompress.models.graphs.blocks import Shapes

__all__ = ["InParts", "free_batch"]

_ATEN = torch.ops.aten
_VIEWS: tuple[Any, ...] = (_ATEN.reshape.default, _ATEN._unsafe_view.default)


def free_batch(module: fx.GraphModule, shapes: Shapes) -> None:
    """Replace the first size of every fixed reshape in `module`, in place."""
    for node in list(module.graph.nodes):
        shape = shapes.get(node)
        if node.op != "call_function" or not shape:
            continue
        if node.target is compute and node.args[0] == "Reshape" and _is_fixed(node.args[2]):
            node.args = (*node.args[:2], (-1, *shape[1:]))
            node.kwargs = {}
        elif node.target in _VIEWS and _is_fixed(node.args[1]):
            node.args = (node.args[0], [-1, *shape[1:]])
        elif node.target is _ATEN.cat.default:
            parts, *axis = node.args
            node.target = compute
            node.args = ("Concat", *parts)
            node.kwargs = {"axis": axis[0] if axis else node.kwargs.get("dim", 0)}
    module.recompile()


def _is_fixed(sizes: Any) -> bool:
    return isinstance(sizes, tuple | list) and all(isinstance(size, int) for size in sizes)


class InParts(nn.Module):
    """The graph of `flat` for batches of `size`, called for one part of a batch after the other."""

    def __init__(self, flat: fx.GraphModule, size: int) -> None:
        """Take parameters, buffers and submodules over from `flat`."""
        super().__init__()
        self.size, self.graph = size, flat.graph
        for name, module in flat.named_children():
            self.add_module(name, module)
        for name, parameter in flat.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in flat.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[B, ...]` to the output; the last part is filled up with its last clip."""
        if clips.shape[0] == self.size:
            return self._part(clips)
        outputs = []
        for part in torch.split(clips, self.size):
            missing = self.size - part.shape[0]
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
            outputs.append(self._part(filled if missing else part)[: part.shape[0]])
        return torch.cat(outputs)

    def _part(self, clips: torch.Tensor) -> torch.Tensor:
        # What is called are the submodules of this one, whatever stands in their place by now.
        result: torch.Tensor = fx.Interpreter(self, graph=self.graph).run(clips)
        return result
