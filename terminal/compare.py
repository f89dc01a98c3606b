"""What a person or a program sees of artifacts side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

__all__ = ["print_comparison"]


def print_comparison(paths: Sequence[Path], *, as_json: bool) -> None:
    """A row for each of the artifacts at `paths`.

    Raises:
        InputError: one is no artifact, has no report, or is named twice.
    """
    from vcompress.validate.comparison import (
        COLUMNS,
        compare_reports,
        comparison_notes,
        comparison_rows,
    )

    if len(set(paths)) < len(paths):
        message = f"name each artifact once, got {' '.join(map(str, paths))}"
        raise InputError(message)
    reports = {}
    for path in paths:
        report = Artifact.open(path).file("report")
        if report is None:
            message = f"{path} has no report; make the artifact again"
            raise InputError(message)
        reports[str(path)] = strict_json.read(report)
    found = compare_reports(reports)
    if as_json:
        data = {"schema": 1, "command": "compare", "artifacts": found}
        print(json.dumps(data, allow_nan=False))
        return
    rows = [COLUMNS, *comparison_rows(found)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((first, *rest)))
    for note in comparison_notes(found):
        print(f"note: {note}")
