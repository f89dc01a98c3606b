"""Several artifacts side by side: size, speed, quality and verdict of each, from its report.

Numbers of different models or test clips do not compare; where these differ, a note says so. The
speed of an artifact is against its own baseline on the machine that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vcompress.validate.closing import find_stage
from vcompress.validate.report_types import Report
from vcompress.validate.wording import UNKNOWN, fixed, sqnr, times, weights_mib

__all__ = ["COLUMNS", "compare_reports", "comparison_notes", "comparison_rows"]

COLUMNS = (
    "artifact", "weights (MiB)", "bits", "latency p50 (ms)", "speed", "top-1 (%)", "drop (pt)",
    "SQNR", "gate",
)  # fmt: skip


def compare_reports(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """One record an artifact, in the order given; what is not known is None."""
    found = []
    for name, report in reports.items():
        stage = find_stage(report, report["result_stage"])
        metrics, latency = stage["metrics"] or {}, stage["latency"] or {}
        speed, verdict = latency.get("speed") or {}, report["verdict"]
        found.append({
            "artifact": name, "weights_sha256": report["model"]["weights_sha256"],
            "weights_mib": report["sizes"]["result_weights_mib"],
            "effective_bits": report["precision"]["result_effective_bits"],
            "p50_ms": latency.get("p50_ms"), "latency_reason": stage["latency_reason"],
            "speed_ratio": speed.get("speed_ratio"),
            "speed_ratio_lower": speed.get("speed_ratio_lower"),
            "speed_ratio_upper": speed.get("speed_ratio_upper"),
            "top1_percent": metrics.get("top1_percent"),
            "drop_points": verdict["drop_points"],
            "drop_points_upper": verdict["drop_points_upper"],
            "sqnr_db": metrics.get("sqnr_db"), "identical": metrics.get("identical"),
            "num_clips": metrics.get("num_clips"), "outcome": verdict["outcome"],
        })  # fmt: skip
    return found


def comparison_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells for `COLUMNS`, one row an artifact."""
    rows: list[tuple[str, ...]] = []
    for one in found:
        speed = UNKNOWN
        if one["speed_ratio"] is not None:
            speed = times(one["speed_ratio"])
            if one["speed_ratio_lower"] is not None:
                speed += f" [{one['speed_ratio_lower']:.2f}, {one['speed_ratio_upper']:.2f}]"
        drop = fixed(one["drop_points"], 2)
        if one["drop_points_upper"] is not None:
            drop += f" (<= {one['drop_points_upper']:.2f})"
        rows.append((
            one["artifact"], weights_mib(one["weights_mib"]), fixed(one["effective_bits"], 2),
            fixed(one["p50_ms"], 2), speed, fixed(one["top1_percent"], 2), drop,
            UNKNOWN if one["num_clips"] is None else sqnr(one), one["outcome"],
        ))  # fmt: skip
    return rows


def comparison_notes(found: list[dict[str, Any]]) -> list[str]:
    """What keeps the numbers from being compared."""
    notes = [
        f"{one['artifact']}: no latency: {one['latency_reason']}"
        for one in found
        if one["p50_ms"] is None
    ]
    if len({one["weights_sha256"] for one in found}) > 1:
        notes.append("made from different weights: quality is each against its own baseline")
    if len({one["num_clips"] for one in found}) > 1:
        notes.append("proven on different numbers of clips")
    return notes
