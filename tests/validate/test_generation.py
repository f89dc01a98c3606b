"""What a report says of a denoiser that does not do the same in every step."""

from __future__ import annotations

from typing import Any

from vcompress.validate.closing import closing_notes, closing_table
from vcompress.validate.html import render_html
from vcompress.validate.report import from_json, to_json
from vcompress.validate.report_types import Report

FOUND: dict[str, Any] = {
    "num_steps": 50, "cache_policy": "forecast", "cache_reason": None, "skip_percent": 86.0,
    "speed_ratio": 6.58, "four_bit_percent": None,
    "precision_reason": "inputs of four bits hold 23 dB in every step",
    "psnr_db": [22.0, 26.0], "precision_alone_psnr_db": [26.0, 28.0], "min_psnr_db": 20.0,
}  # fmt: skip


def with_generation(report: Report, **changes: Any) -> Report:
    files = [{"path": "cache.html", "role": "cache-page", "bytes": 1}]
    sizes = {**report["sizes"], "files": files}
    return {**report, "sizes": sizes, "generation": {**FOUND, **changes}}  # type: ignore[typeddict-item]


def test_a_cache_stands_in_the_table_and_on_the_page(report: Report) -> None:
    found = from_json(to_json(with_generation(report)))
    rows = {row[0]: row[1:] for row in closing_table(found)}
    assert rows["blocks computed over the steps"] == ("100 %", "14.0 %", "6.58x in torch")
    assert rows["PSNR of generated clips (dB, 2 clips)"] == (
        "", "24.00", "lowest 22.00; 27.00 without the cache",
    )  # fmt: skip
    notes = dict(closing_notes(found))
    assert notes["cache"] == "forecast over 50 steps"
    assert notes["inputs"].startswith("the same in every step: inputs of four bits")
    page = render_html(found)
    for words in ("From step to step", "6.58\u00d7", "86.0 %", "24.00 dB", 'href="cache.html"',
                  "mean of 2 held-out clips, lowest 22.00; 20 dB were asked for"):  # fmt: skip
        assert words in page.replace("\xa0", " ")


def test_what_was_not_found_has_its_reason(report: Report) -> None:
    found = with_generation(
        report, cache_policy=None, cache_reason="few steps", skip_percent=None, speed_ratio=None,
        four_bit_percent=40.0, precision_reason=None, psnr_db=[30.0],
    )  # fmt: skip
    notes = dict(closing_notes(found))
    assert notes["cache"] == "none: few steps"
    assert notes["inputs"] == "four bits for 40 % of the work, eight for the rest"
    rows = {row[0]: row[1:] for row in closing_table(found)}
    assert "blocks computed over the steps" not in rows
    assert rows["PSNR of generated clips (dB, 1 clip)"] == ("", "30.00", "lowest 30.00")
    page = render_html(found).replace("\xa0", " ")
    assert "few steps" in page
    assert "Speed of the cache" not in page


def test_nothing_is_said_where_every_step_is_the_same(report: Report) -> None:
    assert "From step to step" not in render_html(report)
    assert "cache" not in dict(closing_notes(report))
