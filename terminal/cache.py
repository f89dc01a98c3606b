"""What `vcompress cache` prints."""

from __future__ import annotations

import json
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from vcompress.terminal.tables import plain_table

if TYPE_CHECKING:
    from vcompress.pipeline.cache import CacheFound

__all__ = ["print_cache"]

# Said elsewhere, or nothing for people.
_LONG = ("policy", "num_steps", "blocks", "magnitudes", "coefficients", "mixture")


def print_cache(found: CacheFound, *, as_json: bool) -> None:
    """The families, what was chosen, and what it is worth on other clips."""
    if as_json:
        exit_code = 0 if found.holds else 3
        data = {"schema": 1, "exit_code": exit_code, **found.as_dict()}
        print(json.dumps(data, allow_nan=False))
        return
    out = RichConsole(highlight=False)
    if found.families:
        out.print(_families(found))
    lines = [("steps", str(found.num_steps))]
    if found.section is not None and found.held_out is not None:
        settings = {
            name: value for name, value in found.section.as_dict().items() if name not in _LONG
        }
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        lines += [
            ("policy", f"{found.section.policy} ({said})"),
            ("reused", f"{found.held_out.report.skip_rate:.1%} of block calls, held out"),
            ("quality", f"PSNR {mean(found.held_out.psnr_db):.2f} dB (lowest "
             f"{min(found.held_out.psnr_db):.2f}), SSIM {mean(found.held_out.ssim):.4f}, held out"),
            *([] if found.feature_distances is None else [
                ("features", f"cosine distance {mean(found.feature_distances):.4f}, held out")
            ]),
            ("speed", f"{mean(found.speed):.2f}x in wall clock here, interleaved"),
        ]  # fmt: skip
    lines.append(("holds" if found.holds else "MISSED", found.reason))
    if found.path is not None:
        lines += [("report", str(found.report)), ("wrote", str(found.path))]
        lines.append(("next", f'vcompress.cached(pipe, "{found.path}")'))
    for word, text in lines:
        out.print(Text(f"{word:<9}{text}"), soft_wrap=True)


def _families(found: CacheFound) -> Table:
    table = plain_table(("family", "reused", "PSNR dB", "SSIM", "tried"), right=range(1, 5))
    for one in found.families:
        cells = ("-", "-", "-")
        if one.best is not None:
            best = one.best
            cells = (
                f"{best.report.skip_rate:.1%}", f"{mean(best.psnr_db):.2f}",
                f"{mean(best.ssim):.4f}",
            )  # fmt: skip
        table.add_row(Text(one.name), *cells, str(one.num_trials))
    return table
