"""JSON that a person may have edited: read strictly, written to be compared line by line."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vcompress.spec.errors import InputError

__all__ = ["check_keys", "dump", "nearest", "parse", "read", "significant"]

_MAX_BYTES = 64 * 2**20


def parse(text: str, where: str) -> Any:
    """Parse JSON; duplicate keys, NaN and infinities are errors, as is any syntax error."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 20000 else []
        if len(set(keys)) != len(keys):
            message = f"{where}: keys given twice: {', '.join(twice[:5])}"
            raise InputError(message)
        return dict(items)

    def finite(digits: str) -> float:
        # 1e999 is valid JSON, and Python reads it as infinity.
        number = float(digits)
        return number if math.isfinite(number) else constant(digits)

    def constant(name: str) -> float:
        message = f"{where}: {name} is not allowed; write a finite number or null"
        raise InputError(message)

    try:
        return json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=finite
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        message = f"{where} is not valid JSON: {error}"
        raise InputError(message) from error


def read(path: Path) -> Any:
    """Parse the JSON file `path` strictly."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            message = f"{path} is larger than {_MAX_BYTES // 2**20} MiB: not a file of vcompress"
            raise InputError(message)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read {path}: {error}"
        raise InputError(message) from error
    return parse(text, str(path))


def dump(data: Any) -> str:
    """Deterministic, indented JSON with a final newline; NaN is an error of ours."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean '...'?` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_keys(
    data: Any, *, required: Iterable[str], optional: Iterable[str] = (), where: str
) -> dict[str, Any]:
    """Return `data` if it is an object with exactly the required and perhaps the optional keys."""
    if not isinstance(data, dict):
        message = f"{where} must be an object, got {type(data).__name__}"
        raise InputError(message)
    required, optional = list(required), list(optional)
    for key in data:
        if key not in required and key not in optional:
            message = f"{where}: unknown key {key!r}{nearest(key, [*required, *optional])}"
            raise InputError(message)
    missing = [key for key in required if key not in data]
    if missing:
        message = f"{where}: missing key {missing[0]!r}"
        raise InputError(message)
    return data


def significant(value: float, digits: int = 6) -> float:
    """`value` rounded to `digits` significant decimal digits."""
    if value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.{digits}g}")
