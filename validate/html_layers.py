"""The layers on the page: the map, the most sensitive ones, the sizes by format, the table."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any

from vcompress.spec.formats import FLOAT
from vcompress.validate.report_types import Layer, Report
from vcompress.validate.wording import UNKNOWN, fixed, short, weights_mib

__all__ = ["layer_view", "shorten"]

# One colour (a class of the style sheet) and one symbol a format: colour alone is not enough.
_LOOKS = {
    "nvfp4": ("four", "4"),
    "int4": ("four", "i4"),
    "mxfp4": ("four", "m4"),
    "fp8": ("eight-b", "f8"),
    "mxfp8": ("eight-b", "m8"),
    "int8": ("eight-a", "8"),
    FLOAT: ("keep", "\u2013"),
}
_MAX_GRID_CELLS = 480
_MAX_GRID_ROWS = 24
_MAX_GRID_COLUMNS = 96
_MAX_CHIPS = 24
_MAX_BARS = 12
_MAX_DECADES = 6
_MAX_ROWS = 320
_MAX_NAME = 96
_MAX_REASON = 120


def shorten(text: str, limit: int) -> str:
    """`text` with its middle left out if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}\u2026{text[-(limit - 1 - head) :]}"


def _look(name: str) -> tuple[str, str]:
    # `int8_token` and `int4_g128` look like the format that they are a variant of.
    return _LOOKS.get(name.partition("_")[0], ("other", name[:2]))


def layer_view(report: Report) -> dict[str, Any]:
    """The layer sections of the page."""
    layers = report["layers"]
    formats = sorted({layer["format"] for layer in layers}, key=_order)
    return {
        "count": len(layers),
        "legend": [_legend(name, layers) for name in formats],
        "grid": _grid(layers),
        "strip": _strip(layers, formats),
        "profile": _profile(layers, formats),
        "bars": _bars(layers),
        "unscored": sum(1 for layer in layers if layer["score"] is None),
        "weights": _weights(report, formats),
        **_table(layers),
    }


def _order(name: str) -> tuple[int, str]:
    known = list(_LOOKS)
    return (known.index(name) if name in known else len(known), name)


def _legend(name: str, layers: list[Layer]) -> dict[str, Any]:
    look, symbol = _look(name)
    count = sum(1 for layer in layers if layer["format"] == name)
    return {"format": name, "look": look, "symbol": symbol, "count": count}


def _place(layer: Layer) -> tuple[str | None, str]:
    """(block, role inside it); the block is guessed up to the first number if it is not given."""
    name = layer["name"]
    if "block" in layer:
        block = layer["block"]
    else:
        match = re.match(r"(?:[^.\d]+\.)+\d+(?=\.)", name)
        block = match.group(0) if match else None
    if block is None or not name.startswith(f"{block}."):
        return None, name
    return block, name[len(block) + 1 :]


def _cell(layer: Layer) -> dict[str, Any]:
    look, symbol = _look(layer["format"])
    score = "" if layer["score"] is None else f", score {short(layer['score'])}"
    title = f"{shorten(layer['name'], _MAX_NAME)}: {layer['format']}{score}"
    return {"look": look, "symbol": symbol, "title": title}


def _grid(layers: list[Layer]) -> dict[str, Any] | None:
    """Roles x blocks, or None where the model has no such shape or is too large for it."""
    places = [_place(layer) for layer in layers]
    blocks = list(dict.fromkeys(block for block, _ in places if block is not None))
    roles = list(dict.fromkeys(role for block, role in places if block is not None))
    outside = [layer for layer, (block, _) in zip(layers, places, strict=True) if block is None]
    fits = len(blocks) >= 2 and len(blocks) <= _MAX_GRID_COLUMNS and len(roles) <= _MAX_GRID_ROWS
    inside = len(layers) - len(outside)
    # A grid that is mostly holes is no map.
    if not fits or len(outside) > _MAX_CHIPS or inside > _MAX_GRID_CELLS:
        return None
    if 2 * inside < len(blocks) * len(roles):
        return None
    at = dict(zip(places, layers, strict=True))
    rows = [
        {
            "role": _breakable(shorten(role, 48)),
            "cells": [_cell(at[block, role]) if (block, role) in at else None for block in blocks],
        }
        for role in roles
    ]
    chips = [{**_cell(layer), "name": shorten(layer["name"], 60)} for layer in outside]
    return {"rows": rows, "blocks": list(range(len(blocks))), "outside": chips}


def _breakable(name: str) -> list[str]:
    """The pieces of a dotted name, between which a line may end."""
    return re.findall(r"[^.]*\.?", name)[:-1]


def _strip(layers: list[Layer], formats: list[str]) -> list[dict[str, Any]]:
    """One row a format over the depth of the model; runs of equal layers are one piece."""
    runs: dict[str, list[str]] = {name: [] for name in formats}
    start = 0
    for name, group in itertools.groupby(layers, key=lambda layer: layer["format"]):
        length = sum(1 for _ in group)
        runs[name].append(f"M{start} 0h{length}v1h-{length}z")
        start += length
    return [
        {**_legend(name, layers), "path": "".join(runs[name]), "width": len(layers)}
        for name in formats
    ]


def _profile(layers: list[Layer], formats: list[str]) -> dict[str, Any] | None:
    """Score over depth on a logarithmic axis, one path of dots a format; None below two scores."""
    scores = [layer["score"] for layer in layers if layer["score"]]
    if len(scores) < 2:
        return None
    top = math.ceil(math.log10(max(scores)))
    bottom = max(math.floor(math.log10(min(scores))), top - _MAX_DECADES)
    bottom = min(bottom, top - 1)

    def height(score: float) -> float:
        power = math.log10(score) if score > 0 else bottom
        return float(round(100 * (top - max(power, bottom)) / (top - bottom), 1))

    paths: dict[str, list[str]] = {name: [] for name in formats}
    for index, layer in enumerate(layers):
        if layer["score"] is not None:
            paths[layer["format"]].append(f"M{index} {height(layer['score'])}h0")
    return {
        "width": len(layers),
        "dots": "small" if len(layers) > 400 else "",
        "paths": [{"look": _look(name)[0], "path": "".join(paths[name])} for name in formats],
        "ticks": [
            {"at": height(10.0**power), "text": f"{10.0**power:g}"}
            for power in range(bottom, top + 1)
        ],
    }


def _bars(layers: list[Layer]) -> list[dict[str, Any]]:
    """The most sensitive layers, worst first."""
    scored = [(layer["score"], layer) for layer in layers if layer["score"] is not None]
    scored.sort(key=lambda pair: -pair[0])
    top = scored[0][0] if scored else 0.0
    bars = []
    for score, layer in scored[:_MAX_BARS]:
        look, symbol = _look(layer["format"])
        bars.append({
            "name": _breakable(shorten(layer["name"], _MAX_NAME)), "format": layer["format"],
            "look": look, "symbol": symbol, "score": short(score),
            "reason": shorten(layer["reason"], _MAX_REASON),
            "width": round(100 * score / top, 2) if top > 0 else 0.0,
        })  # fmt: skip
    return bars


def _weights(report: Report, formats: list[str]) -> dict[str, Any]:
    """Where the bytes of the weights are, before and after."""
    sizes = report["sizes"]
    before, after = sizes["baseline_weights_mib"], sizes["result_weights_mib"]
    reach = max(before, after) or 1.0
    parts, x = [], 0.0
    taken = 0.0
    for name in formats:
        size = sum(x["weight_kib"] for x in report["layers"] if x["format"] == name) / 1024
        taken += size
        parts.append((name, *_look(name), size))
    rest = after - taken
    if rest > 0.005 * after:
        parts.append(("other parameters", "rest", "", rest))
    pieces = []
    for name, look, symbol, size in parts:
        width = 100 * size / reach
        pieces.append({
            "name": name, "look": look, "symbol": symbol, "x": round(x, 2),
            "width": round(width, 2), "text": weights_mib(size, "MiB"),
            "percent": _percent(size, after),
        })  # fmt: skip
        x += width
    return {
        "before": weights_mib(before, "MiB"), "after": weights_mib(after, "MiB"),
        "before_width": round(100 * before / reach, 2), "pieces": pieces,
    }  # fmt: skip


def _percent(part: float, whole: float) -> str:
    if not whole:
        return UNKNOWN
    percent = 100 * part / whole
    return "< 1 %" if 0 < percent < 1 else fixed(percent, 0, "%")


def _table(layers: list[Layer]) -> dict[str, Any]:
    """All layers in model order, or those that stand out if there are too many."""
    chosen = layers
    if len(layers) > _MAX_ROWS:
        usual = Counter(layer["format"] for layer in layers).most_common(1)[0][0]
        ranked = sorted(
            range(len(layers)),
            key=lambda i: (layers[i]["format"] == usual, -(layers[i]["score"] or 0.0)),
        )
        chosen = [layers[index] for index in sorted(ranked[:_MAX_ROWS])]
    rows = []
    for layer in chosen:
        look, symbol = _look(layer["format"])
        rows.append({
            "name": shorten(layer["name"], _MAX_NAME), "format": layer["format"], "look": look,
            "symbol": symbol, "reason": shorten(layer["reason"], _MAX_REASON),
            "score": short(layer["score"]), "size": fixed(layer["weight_kib"], 1),
        })  # fmt: skip
    return {"rows": rows, "hidden": len(layers) - len(chosen)}
