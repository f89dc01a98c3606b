"""What the benchmark writes for CI and for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.bench_files import append_history, draw_history, junit, read_history


def run(outcome: str | None, percent: float = 0.0) -> dict[str, Any]:
    judged = {
        "outcome": outcome, "reason": "a <reason>", "slowdown_percent": percent,
        "lower_percent": percent - 1, "upper_percent": percent + 1,
    }  # fmt: skip
    return {
        "command": "bench", "artifact": "out/<1>", "versus": "main.json", "created": "2026",
        "log_ratio": percent / 100, "standard_error": 0.004,
        "verdict": judged if outcome else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "child"),
    [("pass", "system-out"), ("regression", "failure"), ("inconclusive", "error")],
)
def test_junit_tells_the_three_outcomes_apart(outcome: str, child: str) -> None:
    suite = ElementTree.fromstring(junit(run(outcome)))
    assert suite.get("failures") == str(int(outcome == "regression"))
    assert suite.get("errors") == str(int(outcome == "inconclusive"))
    assert [element.tag for element in suite[0]] == [child]


def test_history_is_read_back_without_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for percent in (0.0, 6.0):
        append_history(run("pass", percent), path)
    path.write_text(path.read_text() + '{"command": "be')
    assert [one["log_ratio"] for one in read_history(path)] == [0.0, 0.06]
    path.write_text('{"command": "be\n' + path.read_text())
    with pytest.raises(InputError, match="line 1"):
        read_history(path)


@pytest.mark.parametrize("outcome", ["regression", None])
def test_the_picture_has_a_mark_for_every_run(outcome: str | None) -> None:
    root = ElementTree.fromstring(draw_history([run(outcome), run(outcome, 9.0)]))
    marks = root.findall(".//{*}circle")
    assert len(marks) == 2
    first, second = (float(mark.get("cy", "")) for mark in marks)
    assert second < first
