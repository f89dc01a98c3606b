"""The repeated blocks of a flat graph, put back as modules that are called.

A graph has the names of its blocks (`encoder.layer.0...`) and no calls of them. A block is a run of
nodes, from its first layer or constant to where one tensor alone goes on: the sum of the residual
connection that ends it. Members of a list of which that is not true (towers that run side by side)
stay flat; their layers are then judged by their own outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from vcompress.models.graphs.tree import attribute, place_tensor

__all__ = ["Shapes", "recorded_shapes", "with_blocks"]

# Of the (first) tensor that a node computes; None for sizes.
Shapes = Mapping[fx.Node, tuple[int, ...] | None]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...] | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        first = value[0] if isinstance(value, tuple) and value else value
        self.shapes[n] = tuple(first.shape) if isinstance(first, torch.Tensor) else None
        return value


def recorded_shapes(module: fx.GraphModule, clips: torch.Tensor) -> Shapes:
    """The shape of every tensor in the graph, when it runs on `clips`."""
    recorder = _Recorder(module)
    with torch.inference_mode():
        recorder.run(clips)
    return recorder.shapes


def with_blocks(module: fx.GraphModule, shapes: Shapes) -> tuple[str, ...]:
    """Make the blocks of `module` submodules that it calls, in place; returns their names."""
    names: list[str] = []
    data = _data(module.graph, shapes)
    for members in _lists(module.graph):
        runs = _runs(module.graph, members, data)
        for name, nodes in runs:
            _extract(module, name, nodes, data)
            names.append(name)
    if names:
        module.recompile()
    return tuple(names)


def _data(graph: fx.Graph, shapes: Shapes) -> set[fx.Node]:
    """The tensors that depend on what is in the clips, not on the size of the batch alone."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        if shapes.get(node) is not None and (
            node.op == "placeholder" or any(source in data for source in node.all_input_nodes)
        ):
            data.add(node)
    return data


def _paths(graph: fx.Graph) -> dict[fx.Node, str]:
    return {
        node: str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")
    }


def _lists(graph: fx.Graph) -> list[list[str]]:
    """Members of the outermost lists with at least two that hold layers, by full name."""
    layers = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    members: dict[str, dict[str, None]] = {}
    for layer in layers:
        parts = layer.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdecimal():
                container = ".".join(parts[:place])
                members.setdefault(container, {})[".".join(parts[: place + 1])] = None
    lists = {container: list(found) for container, found in members.items() if len(found) > 1}
    inside = [f"{member}." for found in lists.values() for member in found]
    return [
        found
        for container, found in lists.items()
        if not any(f"{container}.".startswith(member) for member in inside)
    ]


def _runs(
    graph: fx.Graph, members: list[str], data: Collection[fx.Node]
) -> list[tuple[str, list[fx.Node]]]:
    """The nodes of each of the `members`; nothing if they are not one behind the other."""
    nodes, paths = list(graph.nodes), _paths(graph)
    place = {node: index for index, node in enumerate(nodes)}
    spans: list[tuple[int, int, str]] = []
    for name in members:
        own = [
            place[node]
            for node, path in paths.items()
            if node.op == "call_module" and path.startswith(f"{name}.")
        ]
        spans.append((min(own), max(own), name))
    spans.sort()
    ends_of_use = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    first, layers = spans[0][0], [place[node] for node in paths if node.op == "call_module"]
    before = max((layer for layer in layers if layer < first), default=0)
    start = next(
        (
            cut
            for cut in range(first, before, -1)
            if len(_alive(nodes[:cut], cut, ends_of_use, data)) == 1
        ),
        first,
    )
    runs: list[tuple[str, list[fx.Node]]] = []
    for index, (_, last, name) in enumerate(spans):
        is_last = index + 1 == len(spans)
        behind = min((layer for layer in layers if layer > last), default=len(nodes) - 1)
        if not is_last:
            behind = spans[index + 1][0]
        # What follows the last block (pooling) is no part of it.
        cuts = range(last + 1, behind + 1) if is_last else range(behind, last, -1)
        end = next(
            (cut for cut in cuts if len(_alive(nodes[start:cut], cut, ends_of_use, data)) == 1),
            None,
        )
        if end is None or any(
            node.op == "call_module" and not paths[node].startswith(f"{name}.")
            for node in nodes[start:end]
        ):
            return []
        runs.append((name, nodes[start:end]))
        start = end
    return runs


def _alive(
    nodes: list[fx.Node], cut: int, ends_of_use: Mapping[fx.Node, int], data: Collection[fx.Node]
) -> list[fx.Node]:
    """What `nodes` compute of the clips and what is read at `cut` or behind it."""
    return [node for node in nodes if ends_of_use[node] >= cut and node in data]


def _extract(
    module: fx.GraphModule, name: str, nodes: list[fx.Node], data: Collection[fx.Node]
) -> None:
    """Make `nodes` the graph of the submodule `name`, and call it in their place."""
    own = f"{name}."
    moved = [node for node in nodes if node.op != "get_attr" or str(node.target).startswith(own)]
    inside = set(moved)
    inputs = dict.fromkeys(
        source for node in moved for source in node.all_input_nodes if source not in inside
    )
    # Parameters are inputs of a block only if several share them.
    results = [node for node in moved if any(user not in inside for user in node.users)]
    results.sort(key=lambda node: node not in data)
    graph = fx.Graph()
    copies = {source: graph.placeholder(source.name) for source in inputs}
    for node in moved:
        copy = graph.node_copy(node, lambda source: copies[source])
        if node.op in ("get_attr", "call_module"):
            copy.target = str(node.target).removeprefix(own)
        copies[node] = copy
    outputs = [copies[node] for node in results]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    parts = module.get_submodule(name)
    block = fx.GraphModule(parts, graph)
    for node in module.graph.nodes:
        # What a constant of this block is to nodes outside of it, too.
        if node.op == "get_attr" and node not in inside and str(node.target).startswith(own):
            inner = str(node.target).removeprefix(own)
            trained = isinstance(attribute(parts, inner), torch.nn.Parameter)
            place_tensor(block, inner, attribute(parts, inner), trained=trained)
    with module.graph.inserting_after(nodes[-1]):
        module.set_submodule(name, block)
        called = module.graph.call_module(name, tuple(inputs))
    if len(results) == 1:
        results[0].replace_all_uses_with(called, lambda user: user not in inside)
    else:
        for number, node in reversed(list(enumerate(results))):
            with module.graph.inserting_after(called):
                part = module.graph.call_function(operator.getitem, (called, number))
            node.replace_all_uses_with(part, lambda user: user not in inside)
    for node in reversed(moved):
        module.graph.erase_node(node)
