"""The section `dynamic_precision` of a plan: how finely a block's inputs are rounded, step by step.

Weights stay in NVFP4. What enters the layers of a block has four bits where the error that this
would make is predicted to be small, and more bits elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.strict_json import check_keys

__all__ = ["FINE_INPUTS", "STORED", "DynamicSection", "ErrorLine", "Signal"]

# What a block's line is a function of: what the block added to its input in the step before; how
# far its input has moved since then; nothing.
Signal = Literal["added", "moved", "none"]

# The format of the weights, whose own inputs have four bits.
STORED = "nvfp4"
# Formats of inputs whose scales are taken from the input itself.
FINE_INPUTS = ("int8_token", "fp8_channel", FLOAT)

_KEYS = (
    "signal", "threshold", "fine", "protect_first", "protect_last", "num_steps", "outlier_ratio",
    "blocks",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ErrorLine:
    """The predicted error of a block with inputs of four bits: alpha * signal + beta."""

    alpha: float
    beta: float


@dataclass(frozen=True, kw_only=True)
class DynamicSection:
    """When the NVFP4 layers of a block round their inputs to four bits.

    A block does in a step whose predicted error is at most `threshold`. It does not where nothing
    is predicted: in the first step and after a step that a cache left out, whose signal is stale.

    Attributes:
        signal: what the lines are functions of; with "none" a block is what it is in every step.
        threshold: the largest predicted error, relative to the block's output.
        fine: the format of inputs elsewhere, one of `FINE_INPUTS`.
        protect_first, protect_last: so many steps at either end have fine inputs.
        num_steps: of the run that it was found for; the last steps are told by it.
        outlier_ratio: with a cache, inputs whose largest magnitude is more than so many times the
            mean one are not rounded at all in a step that a later one may use again; None rounds.
        blocks: the line of every block, by full name.
    """

    signal: Signal
    threshold: float
    num_steps: int
    blocks: Mapping[str, ErrorLine]
    fine: str = FINE_INPUTS[0]
    protect_first: int = 0
    protect_last: int = 0
    outlier_ratio: float | None = 25.0

    def __post_init__(self) -> None:
        _one_of(self.signal, "signal", get_args(Signal))
        _one_of(self.fine, "fine", FINE_INPUTS)
        _number(self.threshold, "threshold")
        if self.outlier_ratio is not None:
            _number(self.outlier_ratio, "outlier_ratio")
        for name, least in (("protect_first", 0), ("protect_last", 0), ("num_steps", 1)):
            value = getattr(self, name)
            # JSON's true is an integer for Python.
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                message = f"dynamic_precision.{name} must be an integer >= {least}, got {value!r}"
                raise InputError(message)
        if not self.blocks:
            message = "dynamic_precision.blocks has no block; delete the section to do without it"
            raise InputError(message)

    def protects(self, step: int) -> bool:
        """Whether `step`, from 0, has fine inputs whatever is predicted."""
        return step < self.protect_first or step >= self.num_steps - self.protect_last

    def takes_four_bits(self, block: str, step: int, signal: float | None) -> bool:
        """Whether `block` has inputs of four bits; `signal` is None where it is not known."""
        if self.protects(step):
            return False
        line = self.blocks[block]
        if self.signal == "none":
            return line.beta <= self.threshold
        return signal is not None and line.alpha * signal + line.beta <= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        lines = {name: [line.alpha, line.beta] for name, line in self.blocks.items()}
        return {name: getattr(self, name) for name in _KEYS[:-1]} | {"blocks": lines}

    @classmethod
    def from_dict(cls, data: Any) -> DynamicSection:
        """Read the section; everything that is wrong is an `InputError`."""
        check_keys(data, required=_KEYS, where="dynamic_precision")
        blocks = data["blocks"]
        if not isinstance(blocks, dict):
            message = f"dynamic_precision.blocks must be an object, got {blocks!r}"
            raise InputError(message)
        return cls(**{**data, "blocks": {name: _line(name, two) for name, two in blocks.items()}})


def _line(name: str, two: Any) -> ErrorLine:
    if not isinstance(two, list) or len(two) != 2:
        message = f"dynamic_precision.blocks.{name} must be [alpha, beta], got {two!r}"
        raise InputError(message)
    for value in two:
        _number(value, f"blocks.{name}")
    return ErrorLine(alpha=two[0], beta=two[1])


def _number(value: Any, name: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        message = f"dynamic_precision.{name} must be a number, got {value!r}"
        raise InputError(message)


def _one_of(value: Any, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        message = f"dynamic_precision.{name} must be one of {', '.join(known)}, got {value!r}"
        raise InputError(message)
