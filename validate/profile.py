"""Where the time of a model goes, and what each technique could save at most.

What: the operators that a model calls are timed by torch's profiler under the module that calls
them. Their times, and what passes between two operators, add up to the call: nothing is estimated.
Beside them stands the time of a call that is not watched, since watching costs time too; the two
should be within a few percent of each other. Operations are counted by torch's own counter.

What a technique could save is Amdahl's law (AFIPS 1967): what it cannot touch stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CLASSES", "Ceiling", "LayerTime", "Profile", "ceilings"]

SPATIAL, TEMPORAL = "spatial attention", "temporal attention"
CLASSES = (
    "convolution", "linear", SPATIAL, TEMPORAL, "attention", "cross attention", "normalisation",
    "rest",
)  # fmt: skip
# How much faster eight bits are multiplied than float32 where there are instructions for it.
_EIGHT_BITS = 4.0
_KEPT_TOKENS = 0.5
_REUSED_STEPS = 0.6


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """What one module did itself, its children not counted.

    Attributes:
        name: full name; "" for the model.
        kind: a class in `CLASSES`: of its longest operator; the rest only if it has no other.
        in_block: whether it is part of a repeated block.
        tokens: rows of what entered: tokens of all clips; sequence length of an attention.
        operations: floating-point operations, two a multiplication with addition.
        bytes: of weights, inputs and outputs.
        seconds: of one call of the model.
        by_class: the same seconds, by the class of each operator.
    """

    name: str
    kind: str
    in_block: bool
    tokens: int
    operations: int
    bytes: int
    seconds: float
    by_class: Mapping[str, float]

    @property
    def intensity(self) -> float:
        """Operations a byte: below what the machine does in the time of one byte, memory limits."""
        return self.operations / max(self.bytes, 1)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most that a technique can do for this model.

    Attributes:
        technique: in words.
        share: of the time, that it acts on.
        assumed: what the technique is taken to do with this share, in words.
        speedup: of the model, if it does that and costs nothing.
        limit: of the model, if the share took no time at all.
    """

    technique: str
    share: float
    assumed: str
    speedup: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One model on one machine.

    Attributes:
        model: its name.
        runtime: what ran it.
        device: of the machine.
        batch_size: clips of a call.
        threads: of the runtime.
        measured_seconds: the least disturbed call that is not watched.
        profiled_seconds: the least disturbed one that is; what `classes` adds up to.
        classes: seconds by class.
        operators: the longest operators of the class "rest", by seconds.
        layers: modules in the order of their first call.
        ceilings: what techniques could do.
    """

    model: str
    runtime: str
    device: Mapping[str, Any]
    batch_size: int
    threads: int
    measured_seconds: float
    profiled_seconds: float
    classes: Mapping[str, float]
    operators: Mapping[str, float]
    layers: tuple[LayerTime, ...]
    ceilings: tuple[Ceiling, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        layers = [{**asdict(layer), "intensity": layer.intensity} for layer in self.layers]
        return {"schema": 1, "command": "profile", **asdict(self), "layers": layers}


def ceilings(
    layers: Sequence[LayerTime], total: float, *, has_tokens: bool, is_denoiser: bool
) -> tuple[Ceiling, ...]:
    """What each technique could do for a model whose call takes `total` seconds.

    Args:
        layers: with seconds that add up to `total`, up to what passes between them.
        total: seconds, more than 0.
        has_tokens: whether tokens of this model can be reduced.
        is_denoiser: whether steps of a generation can be reused.
    """

    def share(*classes: str, block: bool = False) -> float:
        return sum(
            seconds
            for layer in layers
            for name, seconds in layer.by_class.items()
            if name in classes and (layer.in_block or not block)
        ) / total  # fmt: skip

    attention = (SPATIAL, TEMPORAL, "attention", "cross attention")
    found = []

    def add(technique: str, acts_on: float, assumed: str, saved: float) -> None:
        if acts_on > 0:
            limit = 1 / max(1 - acts_on, 1e-9)
            found.append(Ceiling(
                technique=technique, share=acts_on, assumed=assumed,
                speedup=1 / max(1 - saved, 1e-9), limit=limit,
            ))  # fmt: skip

    weights, products = share("linear", "convolution"), share(*attention)
    eight = 1 - 1 / _EIGHT_BITS
    faster = f"{_EIGHT_BITS:.0f}x as fast in 8 bits"
    add("quantize linears and convolutions", weights, faster, weights * eight)
    add("quantize attention's products", products, faster, products * eight)
    inside = share(*CLASSES, block=True)
    if has_tokens:
        kept = _KEPT_TOKENS
        # The products of an attention are between tokens; all else is of each token.
        saved = inside * (1 - kept) + share(*attention, block=True) * (kept - kept**2)
        add("reduce tokens", inside, f"{kept:.0%} of the tokens in all blocks", saved)
    if is_denoiser:
        reused = f"{_REUSED_STEPS:.0%} of the steps reuse all blocks"
        add("cache blocks over steps", inside, reused, inside * _REUSED_STEPS)
    return tuple(sorted(found, key=lambda each: -each.speedup))
