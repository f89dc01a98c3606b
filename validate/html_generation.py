"""What a denoiser does from step to step, for the page: in rows of text."""

from __future__ import annotations

from statistics import mean
from typing import Any

from vcompress.validate.report_types import Generation, Report
from vcompress.validate.wording import fixed

__all__ = ["generation_view"]

# Pages of their own, by the role that their file has in the artifact.
_PAGES = {
    "cache-page": "the cache: maps, pictures, and the curve of speed against quality",
    "precision-page": "precision from step to step: maps and pictures",
}


def generation_view(report: Report) -> dict[str, Any] | None:
    """Rows of (what, value, remark), and the pages that say more; None where nothing changes."""
    found = report.get("generation")
    if found is None:
        return None
    return {
        "rows": [*_cache(found), *_inputs(found), *_clips(found)],
        "pages": [
            {"path": file["path"], "about": _PAGES[file["role"]]}
            for file in report["sizes"]["files"]
            if file["role"] in _PAGES
        ],
    }


def _cache(found: Generation) -> list[dict[str, str]]:
    if found["cache_policy"] is None:
        reason = found["cache_reason"]
        return [] if reason is None else [_row("Cache", "none", reason)]
    steps = "" if found["num_steps"] is None else f"over {found['num_steps']} steps"
    rows = [_row("Cache", found["cache_policy"], steps)]
    if found["skip_percent"] is not None:
        rows.append(_row("Reused", fixed(found["skip_percent"], 1, "%"), "of block calls"))
    if found["speed_ratio"] is not None:
        about = "wall clock in torch, the quantized layers without and with the cache in turn"
        rows.append(_row("Speed", f"{found['speed_ratio']:.2f}\u00d7", about))
    return rows


def _inputs(found: Generation) -> list[dict[str, str]]:
    if found["four_bit_percent"] is not None:
        share = fixed(found["four_bit_percent"], 0, "%")
        about = "of the work of layers whose precision changes from step to step"
        return [_row("Inputs of four bits", share, about)]
    reason = found["precision_reason"]
    return [] if reason is None else [_row("Inputs", "the same in every step", reason)]


def _clips(found: Generation) -> list[dict[str, str]]:
    rows = []
    for name, values in (
        ("PSNR of generated clips", found["psnr_db"]),
        ("Without the cache", found["precision_alone_psnr_db"]),
    ):
        if values:
            number = f"{len(values)} held-out clip{'' if len(values) == 1 else 's'}"
            about = f"mean of {number}, lowest {min(values):.2f}"
            rows.append(_row(name, fixed(mean(values), 2, "dB"), about))
    if rows and found["min_psnr_db"] is not None:
        rows[0]["about"] += f"; {found['min_psnr_db']:g} dB were asked for"
    return rows


def _row(what: str, value: str, about: str) -> dict[str, str]:
    return {"what": what, "value": value, "about": about}
