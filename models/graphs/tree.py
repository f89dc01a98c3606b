"""A tree of modules that grows from full names, for layers and constants of a graph."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vcompress.models.structure import layer_kind

__all__ = [
    "attribute",
    "free_name",
    "place_module",
    "place_tensor",
    "tidy_name",
]

# What frameworks append to the name of a layer for its weight and its operator.
_TAILS = re.compile(
    r"([./_](weight|kernel|bias|MatMul|Gemm|Conv|Conv\d?D|Add|BiasAdd|ReadVariableOp)(_\d+)?|:\d+)$"
)


def tidy_name(name: str, *, of_layer: bool) -> str:
    """`name` of a value or node as a full name of a module; `of_layer` cuts `.weight` and such."""
    while of_layer and _TAILS.search(name):
        name = _TAILS.sub("", name)
    scopes = re.sub(r"[^\w./]", "_", name).split("/")
    # The older exporter of torch writes `layer1/layer1.0/conv`.
    kept = [
        scope
        for scope, inner in zip(scopes, [*scopes[1:], ""], strict=True)
        if not inner.startswith(f"{scope}.")
    ]
    parts = ".".join(kept).split(".")
    return ".".join(part for part in parts if part)


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    module = root
    for part in path.split(".") if path else ():
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module, child


def free_name(root: nn.Module, wanted: str) -> str:
    """`wanted`, or a name like it where something else has that one or a layer would enclose it.

    Nothing may lie inside a layer, which will be exchanged.
    """
    parent, _, child = wanted.rpartition(".")
    while parent and _is_layer(root, parent):
        wanted = f"{parent}_{child}"
        parent, _, child = wanted.rpartition(".")
    name, number = wanted, 1
    while _is_taken(root, name):
        name, number = f"{wanted}_{number}", number + 1
    return name


def _is_layer(root: nn.Module, name: str) -> bool:
    module: object = root
    for part in name.split("."):
        module = getattr(module, part, None)
    return isinstance(module, nn.Module) and layer_kind(module) is not None


def _is_taken(root: nn.Module, name: str) -> bool:
    module: object = root
    parts = name.split(".")
    for part in parts[:-1]:
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
        if not isinstance(module, nn.Module):
            return True
    return hasattr(module, parts[-1])


def place_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`, with empty modules on the way."""
    parent, child = _parent(root, name)
    parent.add_module(child, module)


def place_tensor(root: nn.Module, name: str, value: torch.Tensor, *, trained: bool) -> None:
    """Put `value` at `name`: a parameter if it was `trained`, else a buffer."""
    parent, child = _parent(root, name)
    if trained and value.is_floating_point():
        parent.register_parameter(child, nn.Parameter(value, requires_grad=False))
    else:
        parent.register_buffer(child, value)


def attribute(root: nn.Module, name: str) -> Any:
    """What stands at the full name `name`."""
    path, _, child = name.rpartition(".")
    return getattr(root.get_submodule(path), child)
