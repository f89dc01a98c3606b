"""Run torch with the values that an ONNX file rounded to.

Where both sides are given the same codes, and tokens are merged alike, what is left of a difference
belongs to one stretch of floating-point arithmetic, and each code or choice that torch would have
made otherwise can be looked at: it lies on a tie, or something is wrong.
Source: ours; the idea of feeding back the other side's choices is teacher forcing (Williams and
Zipser, 1989).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vcompress.compress.attention_products import FIRST_OPERAND, AttentionProducts
from vcompress.compress.frozen import FrozenLayer

__all__ = [
    "DECISION", "DECISIONS", "Count", "Operands", "compare_codes", "compare_decisions",
    "forced_decisions", "forced_layers", "forced_products",
]  # fmt: skip

# And a number: the name, in a file, of what one call of `decided` passed on.
DECISION = "decision_"
# As what stands beside the names of layers.
DECISIONS = "token reduction"

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


@dataclass
class Count:
    """Values of one layer's inputs."""

    values: int = 0
    differing: int = 0
    unexplained: int = 0


@contextlib.contextmanager
def forced_layers(
    layers: Mapping[str, FrozenLayer],
    codes: Mapping[str, list[torch.Tensor]],
    counts: Mapping[str, Count],
) -> Iterator[None]:
    """Let `layers` compute with `codes`; count what they would have done otherwise."""

    def replacement(name: str, layer: FrozenLayer) -> Callable[[torch.Tensor], torch.Tensor]:
        original = layer.quantized_input
        queue = iter(codes[name])

        def quantized_input(x: torch.Tensor) -> torch.Tensor:
            theirs = next(queue)
            compare_codes(original, x, theirs, counts[name])
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
def forced_products(
    attentions: Mapping[str, AttentionProducts], operands: list[Operands],
    counts: Mapping[str, Count],
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
            compare_codes(lambda values: original(operand, values), x, theirs, counts[name])
            return theirs

        return rounded

    try:
        for name, products in attentions.items():
            products.__dict__["rounded"] = replacement(name, products)
        yield
    finally:
        for products in attentions.values():
            products.__dict__.pop("rounded", None)


@contextlib.contextmanager
def forced_decisions(decisions: Mapping[int, torch.Tensor], count: Count) -> Iterator[None]:
    """Let tokens be reduced as `decisions` say, by the number of the call of `decided`."""
    with _Decisions(decisions, count):
        yield


class _Decisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, decisions: Mapping[int, torch.Tensor], count: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decisions, self._count, self._number = decisions, count, 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is not torch.ops.vcompress.decided.default:
            return function(*arguments, **(keywords or {}))
        own, scores = arguments
        # What nothing depends on is not in the file.
        theirs = self._decisions.get(self._number, own)
        self._number += 1
        compare_decisions(own, theirs, scores, self._count)
        return theirs.clone()


def compare_decisions(
    own: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor, count: Count
) -> None:
    """Add to `count` where `theirs` are other choices by `scores` than `own`.

    Args:
        own, theirs: places `[..., K]`.
        scores: `[..., N]`; choices that it tells apart by less than a rounding error are ties.
    """
    count.values += own.numel()
    differing = own != theirs
    if not differing.any():
        return
    count.differing += int(differing.sum())
    worth = scores.gather(-1, own) - scores.gather(-1, theirs)
    tied = worth.abs() <= _NUDGE * scores.abs().amax()
    count.unexplained += int((differing & ~tied).sum())


def compare_codes(
    quantize: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    theirs: torch.Tensor,
    count: Count,
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
