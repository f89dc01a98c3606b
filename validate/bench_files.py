"""What a run of the benchmark leaves behind: JUnit for CI, a history as lines, and its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError

__all__ = ["append_history", "draw_history", "junit", "read_history"]

_WIDTH, _HEIGHT, _LEFT, _EDGE = 640, 240, 56, 24
_COLOURS = {"pass": "#1b7837", "regression": "#b2182b", "inconclusive": "#b8860b"}


def junit(run: Mapping[str, Any]) -> str:
    """The run as JUnit XML: a regression is a failure, an inconclusive run an error."""
    judged = run["verdict"] or {"outcome": "pass", "reason": "recorded, compared with nothing"}
    outcome, reason = judged["outcome"], judged["reason"]
    counts = {
        "tests": "1", "failures": str(int(outcome == "regression")),
        "errors": str(int(outcome == "inconclusive")),
    }  # fmt: skip
    suite = ElementTree.Element("testsuite", {"name": "vcompress bench", **counts})
    case = ElementTree.SubElement(
        suite, "testcase", {"classname": "vcompress.bench", "name": str(run["artifact"])}
    )
    word = {"regression": "failure", "inconclusive": "error"}.get(outcome)
    if word is None:
        ElementTree.SubElement(case, "system-out").text = reason
    else:
        ElementTree.SubElement(case, word, {"type": outcome, "message": reason})
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def append_history(run: Mapping[str, Any], path: Path) -> None:
    """One more line of JSON at the end of `path`."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(run, allow_nan=False, sort_keys=True) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The runs in `path`; a torn last line is left out.

    Raises:
        InputError: another line is no run.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    runs = []
    for index, line in enumerate(lines):
        try:
            run = strict_json.parse(line, f"{path}, line {index + 1}")
        except InputError:
            if index == len(lines) - 1:
                break
            raise
        if not isinstance(run, dict) or run.get("command") != "bench":
            message = f"{path}, line {index + 1} is no run of vcompress bench; name another file"
            raise InputError(message)
        runs.append(run)
    return runs


def draw_history(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs beside the latest one's baseline as an SVG: change in percent, with intervals."""
    shown = [run for run in runs if run["versus"] == runs[-1]["versus"]]
    judged = [run["verdict"] for run in shown]
    zero = 0.0 if judged[0] is not None else float(shown[0]["log_ratio"])
    points = []
    for run, found in zip(shown, judged, strict=True):
        if found is not None:
            middle, low, high = (found[f"{key}_percent"] for key in ("slowdown", "lower", "upper"))
        else:
            centre, reach = run["log_ratio"] - zero, 2.5 * run["standard_error"]
            middle, low, high = (
                100 * math.expm1(value) for value in (centre, centre - reach, centre + reach)
            )
        points.append((run, found, middle, low, high))
    top: float = max(6.0, *(point[4] for point in points))
    bottom: float = min(-6.0, *(point[3] for point in points))

    def y(value: float) -> float:
        return _EDGE + (top - value) / (top - bottom) * (_HEIGHT - 2 * _EDGE)

    parts = []
    for value, dash in ((0.0, ""), (5.0, ' stroke-dasharray="4 4"')):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _EDGE}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#888"{dash}/><text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{f"{value:+.0f}" if value else 0} %</text>'
        )
    step = (_WIDTH - _LEFT - 2 * _EDGE) / max(1, len(points) - 1)
    for index, (run, found, middle, low, high) in enumerate(points):
        x = _LEFT + _EDGE + index * step
        outcome = "recorded" if found is None else found["outcome"]
        colour = _COLOURS.get(outcome, "#2166ac")
        title = escape(f"{run['created']} {outcome} {middle:+.1f} %")
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{title}</title><line x1="{x:.1f}" '
            f'x2="{x:.1f}" y1="{y(high):.1f}" y2="{y(low):.1f}"/><circle cx="{x:.1f}" '
            f'cy="{y(middle):.1f}" r="4"/></g>'
        )
    for index, anchor in ((0, "start"), (len(points) - 1, "end"))[: len(points)]:
        x = _LEFT if index == 0 else _WIDTH - _EDGE
        day = escape(str(points[index][0]["created"])[:10])
        parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{day}</text>')
    versus = escape(f"time of each run against {shown[-1]['versus']}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
        f' height="{_HEIGHT}" font-family="sans-serif" font-size="12"><rect width="100%" '
        f'height="100%" fill="#fff"/><text x="{_LEFT}" y="16">{versus}</text>{"".join(parts)}'
        "</svg>\n"
    )
