"""Find the layer at which an ONNX file departs from the module that it was exported from.

What: every layer is looked at alone, in the order of the graph. What enters it in torch, when all
layers before were given the file's own values, is compared with what enters it in the file; then
the weight that the file multiplies by, after all of its unpacking, and the bias that it adds. So a
fault is found where it is, however far it spreads, and rounding ties are no fault (see `replay`).
The first layer with a departure is where to look: later ones compute with what it left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from vcompress.compress.attention_sites import products_of
from vcompress.compress.frozen import FrozenLayer
from vcompress.export.patterns import PrecisionGraph
from vcompress.export.replay import (
    DECISIONS,
    Count,
    forced_decisions,
    forced_layers,
    forced_products,
)
from vcompress.export.runtime import run_with_internal_values
from vcompress.export.ties import run_with_codes
from vcompress.models.calls import Batch, Call, as_batch, named_arrays
from vcompress.spec.formats import FORMATS

__all__ = ["Departure", "Location", "locate"]

# Floating-point arithmetic of two libraries differs by 1e-6; a fault is seldom below one percent.
_TOLERANCE = 1e-4
_END = "the output"


@dataclass(frozen=True, kw_only=True)
class Departure:
    """One way in which one layer of the file is not that of the module.

    Attributes:
        layer: full name, or "the output" for what comes after the last layer.
        what: "missing", "input", "weight", "bias" or "output".
        detail: for people.
    """

    layer: str
    what: str
    detail: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.layer}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a file departs.

    Attributes:
        num_layers: that were looked at.
        departures: in the order of the graph; empty if the file computes what the module computes,
            up to ties.
    """

    num_layers: int
    departures: tuple[Departure, ...]

    @property
    def first(self) -> Departure | None:
        """Where to look."""
        return self.departures[0] if self.departures else None


@dataclass(frozen=True, kw_only=True)
class _Carrier:
    """An operator of the file that multiplies by a layer's weight."""

    layer: str
    weight: str
    other: str
    weight_is_left: bool
    operator: str
    bias: NDArray[Any] | None


def locate(module: nn.Module, path: Path, x: Batch | NDArray[Any]) -> Location:
    """Compare `module` with its portable ONNX file `path`, layer by layer, on the input `x`.

    Raises:
        InputError: the file is not ONNX.
        BuildError: ONNX Runtime does not take the file.
        MissingCapabilityError: ONNX Runtime is not installed.
    """
    batch = as_batch(x)
    layers = _layers(module)
    carriers = [each for each in _carriers(path) if each.layer in layers]
    rounded = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, FrozenLayer) and FORMATS[layer.format].input_bits
    }
    attentions = products_of(module)
    run = run_with_codes(path, batch, rounded, bool(attentions))
    values = _values(path, batch, carriers)
    counts = {name: Count() for name in (*run.codes, *attentions)}
    decisions = Count()
    floats = {each.layer: values[each.other] for each in carriers if each.layer not in rounded}
    entered: dict[str, list[torch.Tensor]] = {name: [] for name in floats}
    with (
        forced_layers({name: rounded[name] for name in run.codes}, run.codes, counts),
        forced_products(attentions, run.operands, counts),
        forced_decisions(run.decisions, decisions),
        _forced_floats({name: layers[name] for name in floats}, floats, entered),
        torch.inference_mode(),
    ):
        ours = module(batch.flat if isinstance(batch, Call) else batch).float().numpy()
    # The first call stands for a layer that is called more than once.
    first_calls: dict[str, _Carrier] = {}
    for carrier in carriers:
        first_calls.setdefault(carrier.layer, carrier)
    found = []
    for name, carrier in first_calls.items():
        found += _input(name, counts.get(name), entered.get(name, []), floats.get(name))
        found += _parameters(carrier, layers[name], values[carrier.weight])
    found += [
        Departure(
            layer=name, what="input",
            detail=f"{count.unexplained} of {count.values} operands of its products are not what "
            "the module makes of them",
        )
        for name in attentions
        if (count := counts[name]).unexplained
    ]  # fmt: skip
    found += [
        Departure(layer=name, what="missing", detail="the file has no weight of this name")
        for name in layers
        if name not in first_calls
    ]
    if decisions.unexplained:
        detail = f"{decisions.unexplained} of {decisions.values} choices of tokens are not its own"
        found.append(Departure(layer=DECISIONS, what="input", detail=detail))
    difference = _relative(torch.from_numpy(run.output), torch.from_numpy(ours))
    if difference > _TOLERANCE and not found:
        detail = f"all layers agree, and the output differs by {difference:.1e}"
        found.append(Departure(layer=_END, what="output", detail=detail))
    return Location(num_layers=len(first_calls), departures=tuple(found))


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    kinds = (FrozenLayer, nn.Linear, nn.modules.conv._ConvNd)
    return {name: each for name, each in module.named_modules() if isinstance(each, kinds)}


def _carriers(path: Path) -> list[_Carrier]:
    model = onnx.load(str(path))
    graph = PrecisionGraph(model.graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node, weight, other in graph.carriers():
        _, stored = graph.weight_format(weight)
        layer, _, buffer = stored.rpartition(".")
        if buffer.startswith("weight"):
            found.append(_Carrier(
                layer=layer, weight=weight, other=other, operator=node.op_type,
                weight_is_left=node.input[0] == weight, bias=_bias(graph, node, readers),
            ))  # fmt: skip
    return found


def _bias(
    graph: PrecisionGraph, node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]
) -> NDArray[Any] | None:
    """What the file adds to the product: the third input, or what a following Add holds."""
    if len(node.input) > 2 and node.input[2]:
        return _stored(graph, node.input[2])
    for reader in readers.get(node.output[0], []):
        if reader.op_type == "Add":
            (added,) = [name for name in reader.input if name != node.output[0]] or [""]
            return _stored(graph, added)
    return None


def _stored(graph: PrecisionGraph, name: str) -> NDArray[Any] | None:
    return numpy_helper.to_array(graph.stored[name]) if name in graph.stored else None


def _values(path: Path, x: Batch, carriers: list[_Carrier]) -> dict[str, NDArray[Any]]:
    """The operands of every carrier, as the file computes them."""
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    wanted = {name for each in carriers for name in (each.weight, each.other)}
    inputs = named_arrays(x, [value.name for value in graph.input])
    computed = sorted(wanted - set(stored) - set(inputs))
    return {
        **run_with_internal_values(path, inputs, computed),
        **{name: numpy_helper.to_array(stored[name]) for name in wanted & set(stored)},
        **{name: inputs[name] for name in wanted & set(inputs)},
    }


@contextlib.contextmanager
def _forced_floats(
    layers: Mapping[str, nn.Module], values: Mapping[str, NDArray[Any]],
    entered: Mapping[str, list[torch.Tensor]],
) -> Iterator[None]:  # fmt: skip
    """Let layers whose input is not rounded compute with the file's, where it has its shape."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        theirs = torch.from_numpy(values[name])

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            entered[name].append(inputs[0])
            same = inputs[0].shape == theirs.shape and len(entered[name]) == 1
            return (theirs.to(inputs[0].dtype), *inputs[1:]) if same else None

        return enter

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(
    name: str, count: Count | None, entered: list[torch.Tensor], theirs: NDArray[Any] | None
) -> list[Departure]:
    if count is not None and count.unexplained:
        detail = (
            f"what enters it, or its rounding: {count.unexplained} of {count.values} values are "
            "not what the module rounds to, and lie on no tie"
        )
        return [Departure(layer=name, what="input", detail=detail)]
    if entered and theirs is not None and entered[0].shape == theirs.shape:
        difference = _relative(torch.from_numpy(theirs), entered[0])
        if difference > _TOLERANCE:
            detail = f"what enters it differs by {difference:.1e}"
            return [Departure(layer=name, what="input", detail=detail)]
    return []


def _parameters(carrier: _Carrier, layer: nn.Module, theirs: NDArray[Any]) -> list[Departure]:
    """Whether the file multiplies by the module's weight and adds its bias."""
    frozen = isinstance(layer, FrozenLayer)
    weight = layer.dequantized_weight() if isinstance(layer, FrozenLayer) else layer.weight
    assert isinstance(weight, torch.Tensor)
    weight = weight.detach()
    found, file = [], torch.tensor(theirs).float()
    # A linear layer's weight stands transposed on the right of a MatMul.
    straight = file.reshape(weight.shape) if file.numel() == weight.numel() else None
    options = [] if straight is None else [straight]
    if weight.dim() == 2 and file.dim() >= 2 and file.shape[-2:] == weight.t().shape:
        turned = file.reshape(file.shape[-2:]).t()
        is_turned = carrier.operator == "MatMul" and not carrier.weight_is_left
        options = [turned] if is_turned else [*options, turned]
    difference = min((_relative(option, weight.float()) for option in options), default=np.inf)
    if difference > _TOLERANCE:
        how = "dequantizes to" if frozen else "is"
        detail = f"its weight {how} something else in the file: they differ by {difference:.1e}"
        found.append(Departure(layer=carrier.layer, what="weight", detail=detail))
    bias = layer.bias.detach() if isinstance(layer.bias, torch.Tensor) else None
    if bias is not None:
        other = carrier.bias
        apart = (
            np.inf if other is None or other.size != bias.numel()
            else _relative(torch.tensor(other).float().reshape(-1), bias.float())
        )  # fmt: skip
        if apart > _TOLERANCE and bool(bias.any()):
            detail = (
                "its bias is not added" if other is None else f"its bias differs by {apart:.1e}"
            )
            found.append(Departure(layer=carrier.layer, what="bias", detail=detail))
    return found


def _relative(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Relative L2 difference; anything that is not finite is as far apart as can be."""
    difference = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
    return difference if np.isfinite(difference) else float("inf")
