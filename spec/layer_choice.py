"""One line of a plan: what becomes of one layer, and what of it cannot be.

The names here are those of `spec.plan`, which is where they are imported from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import check_keys, significant

__all__ = ["TENSOR_WORDS", "LayerChoice", "LayerFacts", "misfits"]

# What a line may take from the tensors file, and how the parts there are called.
TENSOR_WORDS: Mapping[str, tuple[str, ...]] = {
    "input_smoothing": ("input_smoothing",),
    "low_rank": ("low_rank_down", "low_rank_up"),
    "bias": ("bias",),
    "weight": (),
}
_MAX_FLOAT32 = 3.4028234e38
_RANGES = ("input_amax", "smoothed_amax", "rotated_amax")


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What the plan needs to know of a layer.

    Attributes:
        kind: a `spec.formats.LayerKind`.
        weight_shape: output channels first.
        padding_mode: of a convolution; only "zeros" stays what it is when the input is quantized
            and exported.
        own_forward: name of a layer's class that computes more than the product; empty where the
            layer is torch's own.
    """

    kind: str
    weight_shape: tuple[int, ...]
    padding_mode: str = "zeros"
    own_forward: str = ""

    def objection(self, format_name: str) -> str | None:
        """Why the layer cannot take the format `format_name`, or None if it can."""
        if format_name == FLOAT:
            return None
        if self.own_forward:
            return f"{self.own_forward} computes more than the product, which would be lost"
        if self.padding_mode != "zeros":
            return f"{format_name} needs padding with zeros, the layer pads by {self.padding_mode}"
        return FORMATS[format_name].objection(self.kind, self.weight_shape)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The format of one layer.

    Attributes:
        format: a name in `spec.formats.FORMATS`, or "keep".
        reason: why; for people.
        input_amax: largest absolute input seen in calibration; sets the input scale. None where
            the clips never reached the layer.
        smoothed_amax: the same of the smoothed input; stands in for it where the line has
            `input_smoothing`.
        rotated_amax: the same of the rotated input, smoothed before if the line has that; stands
            in for both where the line has a rotation.
        score: relative error of the enclosing block's output when this layer alone is in the
            target's first format that it can take; None where it was not measured.
        rotation: block size of the Hadamard rotation of the input, a power of two that divides
            the contraction; None for none.
        tensors: words out of `TENSOR_WORDS`: what is taken from the tensors file. "weight" is the
            stored weight, which is then not rounded anew.

    A layer that is kept has neither; what stands there is not used.
    """

    format: str
    reason: str
    input_amax: float | None = None
    smoothed_amax: float | None = None
    rotated_amax: float | None = None
    score: float | None = None
    rotation: int | None = None
    tensors: tuple[str, ...] = ()

    @property
    def rounded_amax(self) -> float | None:
        """Largest absolute value of what gets rounded, as the line stands."""
        if self.rotation is not None and self.rotated_amax is not None:
            return self.rotated_amax
        if "input_smoothing" in self.tensors and self.smoothed_amax is not None:
            return self.smoothed_amax
        return self.input_amax

    def as_dict(self) -> dict[str, Any]:
        """Plain data, floats at six significant digits."""
        data: dict[str, Any] = {"format": self.format}
        if self.rotation is not None:
            data["rotation"] = self.rotation
        if self.tensors:
            data["tensors"] = list(self.tensors)
        for key in _RANGES:
            if (value := getattr(self, key)) is not None:
                data[key] = significant(value)
        if self.score is not None:
            data["score"] = significant(self.score, 4)
        return {**data, "reason": self.reason}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> LayerChoice:
        """Read one line of the section `quantize`."""
        check_keys(
            data, required=("format", "reason"),
            optional=(*_RANGES, "score", "rotation", "tensors"), where=where,
        )  # fmt: skip
        known = (*FORMATS, FLOAT)
        if data["format"] not in known:
            message = (
                f"{where}: unknown format {data['format']!r}; choose one of: {', '.join(known)}"
                f"{strict_json.nearest(str(data['format']), known)}"
            )
            raise InputError(message)
        if not isinstance(data["reason"], str):
            message = f"{where}: reason must be a string, got {data['reason']!r}"
            raise InputError(message)
        for key in (*_RANGES, "score"):
            value = data.get(key)
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value <= _MAX_FLOAT32
            ):
                message = f"{where}: {key} must be a number >= 0, got {value!r}; it is a float32"
                raise InputError(message)
        rotation = data.get("rotation")
        if rotation is not None and not _is_power_of_two(rotation):
            message = f"{where}: rotation must be a power of two, at least 2, got {rotation!r}"
            raise InputError(message)
        return cls(**{**data, "tensors": _tensor_words(data.get("tensors", []), where)})


def _is_power_of_two(value: Any) -> bool:
    return type(value) is int and value >= 2 and value & (value - 1) == 0


def _tensor_words(words: Any, where: str) -> tuple[str, ...]:
    if not isinstance(words, list):
        message = f"{where}: tensors must be a list of words, got {words!r}"
        raise InputError(message)
    for index, word in enumerate(words):
        if not isinstance(word, str) or word not in TENSOR_WORDS or word in words[:index]:
            message = (
                f"{where}: tensors must be different words out of {', '.join(TENSOR_WORDS)}, got "
                f"{word!r}{strict_json.nearest(str(word), TENSOR_WORDS)}"
            )
            raise InputError(message)
    return tuple(words)


def misfits(choice: LayerChoice, facts: LayerFacts, parts: Collection[str] | None) -> Iterator[str]:
    """What in one line of the plan does not fit its layer."""
    if choice.format == FLOAT:
        return
    objection = facts.objection(choice.format)
    if objection:
        yield f"{objection}; choose another format or keep"
        return
    if FORMATS[choice.format].needs_input_amax and choice.rounded_amax is None:
        yield (
            f"{choice.format} needs input_amax, which calibration did not see; use clips that "
            "reach the layer, or keep"
        )
    size = math.prod(facts.weight_shape[1:])
    if choice.rotation is not None and (facts.kind != "linear" or size % choice.rotation):
        yield (
            f"rotation {choice.rotation} needs a linear layer with a contraction divisible by it, "
            f"got {facts.kind} with {size}; use another rotation or none"
        )
    if "low_rank" in choice.tensors and facts.kind != "linear":
        yield f"low_rank is defined for linear layers, not {facts.kind}; delete the word"
    for word in choice.tensors if parts is not None else ():
        assert parts is not None
        wanted = TENSOR_WORDS[word]
        found = set(wanted) <= set(parts) if wanted else any(p.startswith("weight_") for p in parts)
        if not found:
            yield f"the tensors file has no {word} for this layer; delete the word"
