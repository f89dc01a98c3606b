"""Show that two runs differ by rounding ties and by nothing else.

What: two correct kernels differ in the last bits of float32. A quantizer turns such a difference
into a whole step wherever a value lies between two codes, and deeper layers turn one step into
many. So outputs of a right and of a wrong export can be equally far apart. Here torch runs again
with each quantized layer fed the codes that ONNX Runtime chose (see `replay`), and with tokens
reduced as it reduced them: what remains is the
difference of one stretch of floating-point arithmetic at a time, and every code that torch would
have chosen otherwise is counted and checked to lie on a tie.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from vcompress.compress.attention_sites import products_of
from vcompress.compress.frozen import FrozenLayer
from vcompress.export.readback import ProductInFile, read_precision
from vcompress.export.replay import (
    DECISION,
    Count,
    Operands,
    forced_decisions,
    forced_layers,
    forced_products,
)
from vcompress.export.runtime import run_with_internal_values
from vcompress.models.calls import Batch, Call, as_batch, named_arrays
from vcompress.spec.formats import FORMATS

__all__ = ["RunOfFile", "Ties", "count_ties", "run_with_codes"]

_ROUNDED = ("int8", "fp8")
# Largest relative L2 difference that floating-point arithmetic may cause.
_FLOAT_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What is left of a difference when both sides use the same codes.

    Attributes:
        forced_relative_l2: relative L2 difference of the outputs with the codes of ONNX Runtime in
            torch; that of two runs of an unquantized model if the export is right.
        num_values: quantized input values in all layers.
        num_differing: those that torch would have rounded to another value.
        num_decisions_differing: tokens that torch would have merged otherwise.
        num_unexplained: those of both that do not lie on a tie: a wrong scale, rounding or order.
        worst_layer: the layer with the most unexplained values, else with the most that differ;
            empty if none differ.
    """

    forced_relative_l2: float
    num_values: int
    num_differing: int
    num_decisions_differing: int
    num_unexplained: int
    worst_layer: str

    @property
    def all_explained(self) -> bool:
        """Whether nothing is left of the difference once values on ties are rounded alike."""
        return not self.num_unexplained and self.forced_relative_l2 <= _FLOAT_TOLERANCE

    def explanation(self) -> str | None:
        """One line that shows the ties, or None if ties alone do not explain the difference."""
        if not self.all_explained:
            return None
        ties = []
        if self.num_differing:
            ties.append(
                f"{self.num_differing} of {self.num_values} quantized values lie between two "
                f"codes, most of them in {self.worst_layer}"
            )
        if self.num_decisions_differing:
            ties.append(f"{self.num_decisions_differing} choices of tokens are worth the same")
        if not ties:
            return None
        return (
            f"{'; '.join(ties)}; decided alike, the outputs differ by {self.forced_relative_l2:.1e}"
        )


@dataclass(frozen=True, kw_only=True)
class RunOfFile:
    """What an ONNX file computed.

    Attributes:
        output: its first one.
        codes: the quantized inputs of each layer, in the order of calls.
        operands: the quantized operands of each attention, in the order of the graph.
        decisions: where tokens went, by the number of the call of `decided`.
    """

    output: NDArray[Any]
    codes: Mapping[str, list[torch.Tensor]]
    operands: list[Operands]
    decisions: Mapping[int, torch.Tensor]


def count_ties(module: nn.Module, path: Path, x: Batch | NDArray[Any]) -> Ties:
    """Compare `module` with its portable ONNX file `path` on the input `x`.

    Raises:
        MissingCapabilityError: ONNX Runtime is not installed.
    """
    frozen = {
        name: layer
        for name, layer in module.named_modules()
        # The input of a layer with quantized weights alone is not rounded.
        if isinstance(layer, FrozenLayer) and FORMATS[layer.format].input_bits
    }
    attentions = products_of(module)
    batch = as_batch(x)
    run = run_with_codes(path, batch, frozen, bool(attentions))
    counts = {name: Count() for name in (*run.codes, *attentions)}
    decisions = Count()
    with (
        forced_layers({name: frozen[name] for name in run.codes}, run.codes, counts),
        forced_products(attentions, run.operands, counts),
        forced_decisions(run.decisions, decisions),
        torch.inference_mode(),
    ):
        forced = module(batch.flat if isinstance(batch, Call) else batch).float().numpy()
    worst = max(
        counts, key=lambda name: (counts[name].unexplained, counts[name].differing), default=""
    )
    return Ties(
        forced_relative_l2=float(np.linalg.norm(run.output - forced) / np.linalg.norm(forced)),
        num_values=sum(count.values for count in counts.values()),
        num_differing=sum(count.differing for count in counts.values()),
        num_decisions_differing=decisions.differing,
        num_unexplained=sum(count.unexplained for count in (*counts.values(), decisions)),
        worst_layer=worst if worst and counts[worst].differing else "",
    )


def run_with_codes(path: Path, x: Batch, names: Container[str], with_products: bool) -> RunOfFile:
    """The output of the file, and what it rounded to and decided.

    Args:
        names: layers whose rounded inputs are asked for.
        with_products: whether those of attention are.
    """
    # A layer that the output does not depend on is not in the file.
    precision = read_precision(path)
    layers = {name: found for name, found in precision.layers.items() if name in names}
    pairs = _product_pairs(precision.products) if with_products else []
    graph = onnx.load(str(path), load_external_data=False).graph
    wanted = {value for found in layers.values() for value in found.input_values}
    wanted.update(value for pair in pairs for value in pair.values())
    found = (re.fullmatch(f"{DECISION}(\\d+)", name) for node in graph.node for name in node.output)
    decisions = {int(match[1]): match[0] for match in found if match}
    wanted.update(decisions.values())
    inputs = named_arrays(x, [value.name for value in graph.input])
    values = run_with_internal_values(path, inputs, sorted(wanted))
    codes = {
        name: [torch.from_numpy(values[value]) for value in found.input_values]
        for name, found in layers.items()
    }
    operands: list[Operands] = [
        {operand: torch.from_numpy(values[value]) for operand, value in pair.items()}
        for pair in pairs
    ]
    return RunOfFile(
        output=values[graph.output[0].name], codes=codes, operands=operands,
        decisions={
            number: torch.from_numpy(values[name]) for number, name in decisions.items()
        },
    )  # fmt: skip


def _product_pairs(products: Sequence[ProductInFile]) -> list[dict[str, str]]:
    """The values in a file that each quantized attention rounds, by operand.

    What is rounded next after scores is the other product of their attention; where the next one
    is not rounded, it is kept.
    """
    pairs: list[dict[str, str]] = []
    left = list(products)
    while left:
        scores = left.pop(0)
        if scores.format not in _ROUNDED:
            continue
        pair = dict(zip(("query", "key"), scores.values, strict=True))
        if left and left[0].format in _ROUNDED:
            pair |= zip(("probability", "value"), left.pop(0).values, strict=True)
        pairs.append(pair)
    return pairs
