"""Artifacts side by side."""

from __future__ import annotations

import copy

from vcompress.validate.comparison import (
    COLUMNS,
    compare_reports,
    comparison_notes,
    comparison_rows,
)
from vcompress.validate.report_types import Report


def test_unknown_latency_is_said_and_never_invented(report: Report) -> None:
    simulated = copy.deepcopy(report)
    for stage in simulated["stages"]:
        stage["latency"], stage["latency_reason"] = None, "simulated: no kernel"
    found = compare_reports({"a": report, "b": simulated})
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in comparison_rows(found))
    assert first["gate"] == report["verdict"]["outcome"]
    assert second["latency p50 (ms)"] == second["speed"] == "n/a"
    assert "b: no latency: simulated: no kernel" in comparison_notes(found)


def test_other_weights_are_noted(report: Report) -> None:
    other = copy.deepcopy(report)
    other["model"]["weights_sha256"] = "f" * 64
    assert not any("weights" in note for note in comparison_notes(compare_reports({"a": report})))
    notes = comparison_notes(compare_reports({"a": report, "b": other}))
    assert any("different weights" in note for note in notes)
