"""Numbers as people read them: the same words in the closing table and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "UNKNOWN", "change_percent", "fixed", "mib", "sample_word", "short", "sqnr", "times",
    "weights_mib",
]  # fmt: skip

UNKNOWN = "n/a"


def fixed(value: float | int | None, digits: int, unit: str = "") -> str:
    """`value` with `digits` decimals and its unit, or `n/a`."""
    if value is None:
        return UNKNOWN
    text = f"{value:,.{digits}f}"
    # A loss of nothing is not a loss.
    if text.lstrip("-").strip("0.,") == "":
        text = text.lstrip("-")
    return f"{text} {unit}" if unit else text


def short(value: float | int | None) -> str:
    """`value` at three significant digits, or `n/a`."""
    return UNKNOWN if value is None else f"{value:.3g}"


def change_percent(before: float | None, after: float | None) -> str:
    """The relative change, signed, in percent."""
    if before is None or after is None or before == 0:
        return UNKNOWN
    return f"{100 * (after - before) / before:+.1f} %"


def times(ratio: float | None) -> str:
    """A speed ratio; a slow-down is called by its name."""
    if ratio is None:
        return UNKNOWN
    return f"{ratio:.2f}x (slower)" if ratio < 0.995 else f"{ratio:.2f}x"


def mib(num_bytes: int | None) -> str:
    """A file size in the unit that keeps it readable."""
    if num_bytes is None:
        return UNKNOWN
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.1f} KiB"
    return f"{num_bytes / 2**20:,.1f} MiB"


def weights_mib(value: float | None, unit: str = "") -> str:
    """A weight size in MiB, with more decimals where two would hide it."""
    return fixed(value, 2 if value is None or value >= 0.1 or value == 0 else 4, unit)


def sample_word(task: str) -> str:
    """What a model of `task` is tested on one of: a clip, or a recorded call."""
    return "call" if task == "denoise" else "clip"


def sqnr(metrics: Mapping[str, Any] | None) -> str:
    """The SQNR in dB, or that the outputs are identical."""
    if metrics is None:
        return UNKNOWN
    return "identical" if metrics.get("identical") else fixed(metrics["sqnr_db"], 1, "dB")
