"""Tables as all commands print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vcompress.validate.report_types import Report

__all__ = ["closing", "plain_table"]


def plain_table(headers: Sequence[str], right: Sequence[int] = ()) -> Table:
    """A table without frames, which can be pasted."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index in right else "left", overflow="fold")
    return table


def closing(report: Report) -> Table:
    """The baseline and the result of `report`, side by side."""
    from vcompress.validate.closing import closing_table

    table = plain_table(("", "baseline", "result", "change"), right=(1, 2))
    for row in closing_table(report):
        table.add_row(*(Text(cell) for cell in row))
    return table
