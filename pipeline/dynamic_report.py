"""The report of dynamic precision: what it is worth, and where inputs had four bits.

The page of a cache (see `cache_report`) with other words.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import vcompress
from vcompress.pipeline.cache_report import (
    AMPLIFIED,
    lowest,
    picture,
    rate_map,
    side_by_side,
    strip,
)
from vcompress.pipeline.dynamic_search import FAMILIES
from vcompress.validate.frames import ssim
from vcompress.validate.html import render_page

if TYPE_CHECKING:
    from vcompress.pipeline.dynamic_request import DynamicFound
from vcompress.spec.files import replace_file

__all__ = ["write_precision_report"]

_ABOUT = {
    "volatility": "blocks and steps of small predicted error",
    "steps": "all blocks, in a fixed range of steps",
    "blocks": "some blocks, in all steps",
}
_WORDS = {"reached": "four bits", "rest": "more bits", "where": "Where inputs had four bits"}


def write_precision_report(found: DynamicFound, path: Path, *, artifact: str) -> None:
    """Write the page to `path`; `artifact` is the folder's name in the lines that take it over.

    Raises:
        MissingCapabilityError: Jinja2 or Pillow is not installed.
    """
    trial, evidence = found.trial, found.evidence
    static = evidence["four_bits_held_out"]["psnr_db"]
    seen = "a clip" if len(found.cases) == 1 else f"{len(found.cases)} clips"
    similarity = [ssim(*pair) for pair in zip(found.full, trial.clips, strict=True)]
    view = {
        "title": f"{found.name} \u2192 inputs of four bits by {found.family}",
        "page": "precision report", "result": "compressed",
        "words": _WORDS,
        "version": vcompress.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": {
            "word": "Holds" if found.holds else "Missed",
            "symbol": "\u2713" if found.holds else "\u2715",
            "kind": "pass" if found.holds else "fail",
            "reason": f"A mean PSNR of {found.bar.least:g} dB was asked for; on {seen} that the "
            f"search never saw it is {np.mean(trial.psnr_db):.4g} dB, all in torch. The exported "
            f"graphs have four bits in every step: {np.mean(static):.4g} dB.",
        },
        "tiles": _tiles(found, similarity),
        "notes": [], "amplified": AMPLIFIED,
        "clips": [
            {
                "name": case.name, "psnr": f"{psnr:.2f}", "ssim": f"{like:.4f}", "speed": None,
                "video": picture(side_by_side(full, clip, difference=True)),
                "frames": picture(strip(full, clip, difference=True)),
            }
            for case, full, clip, psnr, like in zip(
                found.cases, found.full, trial.clips, trial.psnr_db, similarity, strict=True
            )
        ],
        "map": rate_map(
            trial.report.rate(), trial.report.blocks,
            f"{trial.report.share:.1%} of the work of these layers had inputs of four bits",
        ),
        "families": [_family(name, found) for name in FAMILIES],
        "code": f'pipe.transformer = vcompress.compressed("{artifact}/")\n'
        "print(pipe.transformer.vcompress_dynamic.report())   # after a run",
        "facts": _facts(found),
    }  # fmt: skip
    replace_file(path, render_page("cache.html.j2", view))


def _tiles(found: DynamicFound, similarity: list[float]) -> list[dict[str, str]]:
    trial, evidence = found.trial, found.evidence
    static = evidence["four_bits_held_out"]["psnr_db"]
    return [
        {"label": "PSNR", "value": f"{np.mean(trial.psnr_db):.2f}", "unit": "dB",
         "note": lowest(trial.psnr_db, ".2f")},
        {"label": "SSIM", "value": f"{np.mean(similarity):.4f}", "unit": "",
         "note": lowest(similarity, ".4f")},
        {"label": "Four bits", "value": f"{100 * trial.report.share:.1f}", "unit": "%",
         "note": f"of the work of layers that change, {trial.report.linear_share:.1%} of that of "
         "all linear layers"},
        {"label": "Mean input", "value": f"{trial.report.mean_bits:.2f}", "unit": "bits",
         "note": "of layers that change; weights have 4.5 bits with their scales"},
        {"label": "PSNR of four bits everywhere", "value": f"{np.mean(static):.2f}", "unit": "dB",
         "note": f"what the exported graphs compute, lowest {min(static):.2f}"},
    ]  # fmt: skip


def _family(name: str, found: DynamicFound) -> dict[str, Any]:
    held = found.evidence["families"][name]
    return {
        "name": f"{name}: {_ABOUT[name]}", "tried": "", "chosen": name == found.family,
        "reused": held and f"{held['share']:.1%}",
        "psnr": held and f"{np.mean(held['psnr_db']):.2f}", "ssim": "",
    }  # fmt: skip


def _facts(found: DynamicFound) -> list[dict[str, Any]]:
    evidence, section = found.evidence, found.trial.section
    ends = evidence["worth_of_ends"]
    groups = {
        "Prediction": {
            "signal": evidence["signal"],
            "variance of the error explained": f"{evidence['explained']:.1%}",
            **{
                name: "no correlation, one never changes"
                if value is None
                else f"correlation {value:.2f}"
                for name, value in evidence["correlation"].items()
            },
        },
        "Settings": {
            "other inputs": section.fine, "threshold": f"{section.threshold:.4g}",
            "protected steps": f"{section.protect_first} first, {section.protect_last} last",
            f"worth of the first {ends['steps']} steps": f"{ends['first']:.1%}",
            f"worth of the last {ends['steps']} steps": f"{ends['last']:.1%}",
        },
        "Versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    return [
        {"title": title, "rows": [{"key": key, "value": str(value)} for key, value in rows.items()]}
        for title, rows in groups.items()
    ]
