"""The section `attention` of a plan: in which format the two products of each attention run.

The products are those of queries and keys (QK) and of probabilities and values (PV). They have no
weights, so they are no lines of `quantize`: a line there is a layer with a stored weight, and every
layer has one, while a plan without this section leaves all attentions as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.strict_json import check_keys, nearest, significant

__all__ = [
    "PRODUCT_BITS", "PRODUCT_FORMATS", "AttentionChoice", "read_attention", "unknown_attentions",
]  # fmt: skip

# Format of a line -> formats of QK and of PV.
PRODUCT_FORMATS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "int8": ("int8", "int8"), "fp8": ("fp8", "fp8"), "int8_fp8": ("int8", "fp8"),
        "int8_keep": ("int8", FLOAT),
    }
)  # fmt: skip
# Bits of one value that enters a product in any of them, where it is not kept. A scale for a whole
# tensor is too little to count; nothing is stored, so that effective bits of weights do not change.
PRODUCT_BITS = 8
_MAX_FLOAT32 = 3.4028234e38
_RANGES = ("query_amax", "key_amax", "value_amax")


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The format of both products of one attention.

    Attributes:
        format: a name in `PRODUCT_FORMATS`, or "keep".
        reason: why; for people.
        query_amax, key_amax, value_amax: largest magnitudes seen in calibration, of the keys after
            smoothing if they are smoothed; they set the scales. None where the attention is kept.
        smooth_keys: whether the mean of the keys over tokens is taken off first, which leaves the
            softmax as it is.
        score: relative error of the attention's output on calibration clips; None where it was not
            measured.
    """

    format: str
    reason: str
    query_amax: float | None = None
    key_amax: float | None = None
    value_amax: float | None = None
    smooth_keys: bool = False
    score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, floats at six significant digits."""
        data: dict[str, Any] = {"format": self.format}
        if self.format != FLOAT:
            data["smooth_keys"] = self.smooth_keys
        for name in _RANGES:
            value = getattr(self, name)
            if value is not None:
                data[name] = significant(value)
        if self.score is not None:
            data["score"] = significant(self.score, 4)
        return {**data, "reason": self.reason}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> AttentionChoice:
        """Read one line of the section."""
        check_keys(
            data, required=("format", "reason"), optional=("smooth_keys", "score", *_RANGES),
            where=where,
        )  # fmt: skip
        known = (*PRODUCT_FORMATS, FLOAT)
        if data["format"] not in known:
            message = (
                f"{where}: unknown format {data['format']!r}; choose one of: {', '.join(known)}"
                f"{nearest(str(data['format']), known)}"
            )
            raise InputError(message)
        if not isinstance(data["reason"], str):
            message = f"{where}: reason must be a string, got {data['reason']!r}"
            raise InputError(message)
        if not isinstance(data.get("smooth_keys", False), bool):
            message = f"{where}: smooth_keys must be true or false, got {data['smooth_keys']!r}"
            raise InputError(message)
        for name in ("score", *_RANGES):
            _check_number(data.get(name), f"{where}: {name}")
        choice = cls(**data)
        missing = [name for name in _RANGES if getattr(choice, name) is None]
        if choice.format != FLOAT and missing:
            message = (
                f"{where}: {choice.format} needs {', '.join(missing)}, which calibration finds; "
                "make the plan with --attention, or keep"
            )
            raise InputError(message)
        return choice


def _check_number(value: Any, where: str) -> None:
    if value is None:
        return
    # JSON's true is an integer for Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MAX_FLOAT32:
        message = f"{where} must be a number >= 0, got {value!r}; it is a float32"
        raise InputError(message)


def read_attention(data: Any) -> dict[str, AttentionChoice]:
    """Read the section; everything that is wrong is an `InputError`."""
    if not isinstance(data, dict):
        message = "attention must be an object of module name -> {format, reason}"
        raise InputError(message)
    return {
        name: AttentionChoice.from_dict(line, f"attention.{name}") for name, line in data.items()
    }


def unknown_attentions(
    section: Mapping[str, AttentionChoice], attentions: Collection[str]
) -> Iterator[str]:
    """What in `section` names no attention of the model."""
    for name in section:
        if name not in attentions:
            yield (
                f"attention.{name}: no such attention{nearest(name, attentions)}; only modules "
                "that call scaled_dot_product_attention have products"
            )
