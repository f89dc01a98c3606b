"""Show that two runs differ by rounding ties and by nothing else.

What: two correct kernels differ in the last bits of float32. A quantizer turns such a difference
into a whole step wherever a value lies between two codes, and deeper layers turn one step into
many. So outputs of a right and of a wrong export can be equally far apart. Here torch runs again
with each quantized layer fed the codes that ONNX Runtime chose: what remains is the difference of
one stretch of floating-point arithmetic at a time, and every code that torch would have chosen
otherwise is counted and checked to lie on a tie.
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

from vcompress.compress.attention_products import FIRST_OPERAND, AttentionProducts
from vcompress.compress.attention_sites import products_of
from vcompress.compress.frozen import FrozenLayer
from vcompress.export.readback import read_precision
from vcompress.export.runtime import run_with_internal_values
from vcompress.models.calls import Batch, Call, as_batch, named_arrays
from vcompress.spec.formats import FORMATS

__all__ = ["Ties", "count_ties"]

_ROUNDED = ("int8", "fp8")
# Largest relative L2 difference that floating-point arithmetic may cause.
_FLOAT_TOLERANCE = 1e-5
# What the two products of one attention compute with, by operand.
Operands = Mapping[str, torch.Tensor]

# A value is taken for a tie if moving it by this share of the tensor's largest magnitude reaches
# the other code: far more than the rounding error of float32, far less than a step.
_NUDGE = 1e-5
# Codes of a token or block are multiplied by a scale that may differ in its last bits, if it is
# computed on the way; neighbouring codes are farther apart than this share of their value.
_SAME_CODE = 1e-5
# One of four brings two values together; all of these miss them once in ten thousand times.
_RANDOM_NUDGES = 32


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What is left of a difference when both sides use the same codes.

    Attributes:
        forced_relative_l2: relative L2 difference of the outputs with the codes of ONNX Runtime in
            torch; that of two runs of an unquantized model if the export is right.
        num_values: quantized input values in all layers.
        num_differing: those that torch would have rounded to another value.
        num_unexplained: those of them that do not lie on a tie: a wrong scale or a wrong rounding.
        worst_layer: the layer with the most unexplained values, else with the most that differ;
            empty if none differ.
    """

    forced_relative_l2: float
    num_values: int
    num_differing: int
    num_unexplained: int
    worst_layer: str

    @property
    def all_explained(self) -> bool:
        """Whether nothing is left of the difference once values on ties are rounded alike."""
        return not self.num_unexplained and self.forced_relative_l2 <= _FLOAT_TOLERANCE

    def explanation(self) -> str | None:
        """One line that shows the ties, or None if ties alone do not explain the difference."""
        if not self.num_differing or not self.all_explained:
            return None
        return (
            f"{self.num_differing} of {self.num_values} quantized values lie between two codes, "
            f"most of them in {self.worst_layer}; rounded alike, the outputs differ by "
            f"{self.forced_relative_l2:.1e}"
        )


@dataclass
class _Count:
    """Values of one layer's inputs."""

    values: int = 0
    differing: int = 0
    unexplained: int = 0


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
    output, codes, operands = _run_with_codes(path, batch, frozen, bool(attentions))
    counts = {name: _Count() for name in (*codes, *attentions)}
    with (
        _forced({name: frozen[name] for name in codes}, codes, counts),
        _forced_products(attentions, operands, counts),
        torch.inference_mode(),
    ):
        forced = module(batch.flat if isinstance(batch, Call) else batch).float().numpy()
    worst = max(
        counts, key=lambda name: (counts[name].unexplained, counts[name].differing), default=""
    )
    return Ties(
        forced_relative_l2=float(np.linalg.norm(output - forced) / np.linalg.norm(forced)),
        num_values=sum(count.values for count in counts.values()),
        num_differing=sum(count.differing for count in counts.values()),
        num_unexplained=sum(count.unexplained for count in counts.values()),
        worst_layer=worst if worst and counts[worst].differing else "",
    )


def _run_with_codes(
    path: Path, x: Batch, names: Container[str], with_products: bool
) -> tuple[NDArray[Any], dict[str, list[torch.Tensor]], list[Operands]]:
    """The output of the file, and what it rounded to.

    Returns:
        The output; the quantized inputs of each layer, in the order of calls; the quantized
        operands of each attention, in the order of the graph.
    """
    # A layer that the output does not depend on is not in the file.
    precision = read_precision(path)
    layers = {name: found for name, found in precision.layers.items() if name in names}
    rounded = [each for each in precision.products if each.format in _ROUNDED]
    pairs = list(zip(rounded[::2], rounded[1::2], strict=True)) if with_products else []
    graph = onnx.load(str(path), load_external_data=False).graph
    wanted = {value for found in layers.values() for value in found.input_values}
    wanted.update(value for pair in pairs for product in pair for value in product.values)
    inputs = named_arrays(x, [value.name for value in graph.input])
    values = run_with_internal_values(path, inputs, sorted(wanted))
    codes = {
        name: [torch.from_numpy(values[value]) for value in found.input_values]
        for name, found in layers.items()
    }
    operands: list[Operands] = [
        {
            operand: torch.from_numpy(values[value])
            for operand, value in zip(
                ("query", "key", "probability", "value"), (*scores.values, *mixed.values),
                strict=True,
            )
        }
        for scores, mixed in pairs
    ]  # fmt: skip
    return values[graph.output[0].name], codes, operands


@contextlib.contextmanager
def _forced(
    layers: Mapping[str, FrozenLayer],
    codes: Mapping[str, list[torch.Tensor]],
    counts: Mapping[str, _Count],
) -> Iterator[None]:
    """Let `layers` compute with `codes`; count what they would have done otherwise."""

    def replacement(name: str, layer: FrozenLayer) -> Callable[[torch.Tensor], torch.Tensor]:
        original = layer.quantized_input
        queue = iter(codes[name])

        def quantized_input(x: torch.Tensor) -> torch.Tensor:
            theirs = next(queue)
            _compare(original, x, theirs, counts[name])
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


@contextlib.contextmanager
def _forced_products(
    attentions: Mapping[str, AttentionProducts], operands: list[Operands],
    counts: Mapping[str, _Count],
) -> Iterator[None]:  # fmt: skip
    """The same for `attentions`, of which each call takes the next of `operands`."""
    queue = iter(operands)

    def replacement(
        name: str, products: AttentionProducts
    ) -> Callable[[str, torch.Tensor], torch.Tensor]:
        original = products.rounded
        current: list[Operands] = []

        def rounded(operand: str, x: torch.Tensor) -> torch.Tensor:
            if operand == FIRST_OPERAND:
                current[:] = [next(queue)]
            theirs = current[0][operand]
            _compare(lambda values: original(operand, values), x, theirs, counts[name])
            return theirs

        return rounded

    try:
        for name, products in attentions.items():
            products.__dict__["rounded"] = replacement(name, products)
        yield
    finally:
        for products in attentions.values():
            products.__dict__.pop("rounded", None)


def _compare(
    quantize: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    theirs: torch.Tensor,
    count: _Count,
) -> None:
    """Add to `count` where `theirs` is not what `quantize` makes of `x`."""
    own = quantize(x)
    count.values += own.numel()
    epsilon = torch.finfo(x.dtype).eps
    differing = ~torch.isclose(own, theirs, rtol=max(_SAME_CODE, 2 * epsilon), atol=0.0)
    num_differing = int(differing.sum())
    if not num_differing:
        return
    count.differing += num_differing
    share = max(_NUDGE, 4 * epsilon)
    step = share * x.abs().max() * torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    # By as much as a scale may differ.
    slack = _SAME_CODE * theirs.abs()
    low = high = own
    for signs in _nudges(x):
        moved = quantize(x + signs * step)
        low, high = torch.minimum(low, moved), torch.maximum(high, moved)
        left = differing & ~((low <= theirs + slack) & (theirs - slack <= high))
        if not left.any():
            return
    count.unexplained += int(left.sum())


def _nudges(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Away from zero and toward it, so that the block scales of NVFP4 move both ways as well.

    Then at random, since a value may go one way while the largest of its block goes the other.
    """
    yield torch.ones((), dtype=x.dtype)
    yield -torch.ones((), dtype=x.dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RANDOM_NUDGES):
        yield torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
