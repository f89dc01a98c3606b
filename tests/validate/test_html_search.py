"""The curve of the search: where its points and the plan are drawn."""

from __future__ import annotations

from typing import Any, cast

from vcompress.validate.html_search import search_view
from vcompress.validate.report_types import Report


def view_of(**changes: Any) -> dict[str, Any] | None:
    search = {
        "loss": "kl_nats", "points": [[4.0, 1e-1], [6.0, 1e-2], [8.0, 1e-3], [32.0, 1e-9]],
        "bits": 6.0, "predicted_loss": 1e-2, "calibration_loss": 0.02, **changes,
    }  # fmt: skip
    return search_view(cast("Report", {"search": search}))


def test_points_by_hand() -> None:
    view = view_of()
    assert view is not None
    # Three points, the last of which is beyond twice the bits of the plan and left out.
    assert view["path"] == "M0.0 0.0L50.0 50.0L100.0 100.0"
    assert view["chosen"] == "M50.0 50.0h0"
    assert [row["text"] for row in view["rows"]] == ["1e-3", "1e-2", "1e-1"]
    assert [column["text"] for column in view["columns"]] == ["4", "5", "6", "7", "8"]
    assert view["measured"] == "0.02"


def test_nothing_is_drawn_where_there_is_no_choice() -> None:
    assert search_view(cast("Report", {})) is None
    assert view_of(points=[[4.0, 0.1]]) is None
    assert view_of(points=[[4.0, 0.0], [6.0, 0.0]]) is None
