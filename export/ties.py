"""Show that two runs differ by rounding ties and by nothing else.

What: two correct kernels differ in the last bits of float32. A quantizer turns such a difference
into a whole step wherever a value lies between two codes, and deeper layers turn one step into
many. So outputs of a right and of a wrong export can be equally far apart. Here torch runs again
with each quantized layer fed the codes that ONNX Runtime chose: what remains is the difference of
one stretch of floating-point arithmetic at a time, and every code that torch would have chosen
otherwise is counted.
Source: ours; the idea of feeding back the other side's choices is teacher forcing (Williams and
Zipser, 1989).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from vcompress.compress.frozen import FrozenLayer
from vcompress.export.readback import read_precision
from vcompress.export.runtime import run_with_internal_values

__all__ = ["Ties", "count_ties"]


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What is left of a difference when both sides use the same codes.

    Attributes:
        forced_relative_l2: relative L2 difference of the outputs with the codes of ONNX Runtime in
            torch; that of two runs of an unquantized model if the export is right.
        num_values: quantized input values in all layers.
        num_differing: those that torch would have rounded to another value.
        worst_layer: the layer with the largest share of them; empty if there are none.
        worst_share: that share.
    """

    forced_relative_l2: float
    num_values: int
    num_differing: int
    worst_layer: str
    worst_share: float


def count_ties(module: nn.Module, path: Path, x: NDArray[Any]) -> Ties:
    """Compare `module` with its portable ONNX file `path` on the input `x`.

    Raises:
        MissingCapabilityError: ONNX Runtime is not installed.
    """
    frozen = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, FrozenLayer)
    }
    output, codes = _run_with_layer_inputs(path, x, frozen)
    shares: dict[str, tuple[int, int]] = {}
    with _forced({name: frozen[name] for name in codes}, codes, shares), torch.inference_mode():
        forced = module(torch.from_numpy(x)).float().numpy()
    worst = max(shares, key=lambda name: shares[name][0] / shares[name][1], default="")
    num_differing = sum(differing for differing, _ in shares.values())
    return Ties(
        forced_relative_l2=float(np.linalg.norm(output - forced) / np.linalg.norm(forced)),
        num_values=sum(total for _, total in shares.values()),
        num_differing=num_differing,
        worst_layer=worst if num_differing else "",
        worst_share=shares[worst][0] / shares[worst][1] if num_differing else 0.0,
    )


def _run_with_layer_inputs(
    path: Path, x: NDArray[Any], names: Container[str]
) -> tuple[NDArray[Any], dict[str, list[torch.Tensor]]]:
    """The output of the file, and the quantized inputs of each layer, in the order of calls."""
    # A layer that the output does not depend on is not in the file.
    layers = {name: found for name, found in read_precision(path).layers.items() if name in names}
    graph = onnx.load(str(path), load_external_data=False).graph
    wanted = {value for found in layers.values() for value in found.input_values}
    values = run_with_internal_values(path, {graph.input[0].name: x}, sorted(wanted))
    return values[graph.output[0].name], {
        name: [torch.from_numpy(values[value]) for value in found.input_values]
        for name, found in layers.items()
    }


@contextlib.contextmanager
def _forced(
    layers: Mapping[str, FrozenLayer],
    codes: Mapping[str, list[torch.Tensor]],
    shares: dict[str, tuple[int, int]],
) -> Iterator[None]:
    """Let `layers` compute with `codes`; count in `shares` what they would have done otherwise."""

    def replacement(name: str, layer: FrozenLayer) -> Callable[[torch.Tensor], torch.Tensor]:
        original = layer.quantized_input
        queue = iter(codes[name])

        def quantized_input(x: torch.Tensor) -> torch.Tensor:
            own, theirs = original(x), next(queue)
            differing, total = shares.get(name, (0, 0))
            shares[name] = (differing + int((own != theirs).sum()), total + own.numel())
            return theirs

        return quantized_input

    try:
        for name, layer in layers.items():
            # An attribute of the instance hides the method of its class.
            layer.__dict__["quantized_input"] = replacement(name, layer)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("quantized_input", None)
