"""The page: a report as one self-contained HTML file.

It needs no network, no script and no second file: styles and drawings (SVG) are inline, and a
content policy forbids everything else. All text comes from the report through Jinja2's
autoescaping; nothing is marked safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcompress.spec.errors import MissingCapabilityError
from vcompress.validate.html_view import make_view
from vcompress.validate.report_types import Report

__all__ = ["render_html", "render_page"]

_TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: Report) -> str:
    """The text of `report.html`: verdict first, readable on a phone, in the dark and on paper.

    Equal reports give equal bytes. Long layer tables are cut to the rows that matter (the page
    says so; `report.json` has all), so that the page stays below 300 kB.

    Args:
        report: as `build_report` or `from_json` gives it.

    Raises:
        MissingCapabilityError: Jinja2 is not installed.
    """
    return render_page("report.html.j2", make_view(report))


def render_page(template: str, view: Mapping[str, Any]) -> str:
    """The text of a page: what `view` says, in a template of this package.

    Raises:
        MissingCapabilityError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        message = "the HTML report needs Jinja2, which is not installed; pip install jinja2"
        raise MissingCapabilityError(message) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(view) + "\n"
