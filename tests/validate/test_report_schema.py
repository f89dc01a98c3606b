"""The published schema: what real reports are, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from vcompress.validate.report import to_json
from vcompress.validate.report_schema import SCHEMA_FILE, report_schema
from vcompress.validate.report_types import Report

STORED = sorted(Path(__file__).parents[1].glob("browser/*.json"))
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def errors(report: Any) -> list[str]:
    return [error.json_path for error in Draft202012Validator(SCHEMA).iter_errors(report)]


def test_the_published_file_is_what_the_types_say() -> None:
    assert report_schema() == SCHEMA, "run python -m vcompress.validate.report_schema"
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_reports_of_real_runs_have_it(path: Path) -> None:
    assert errors(json.loads(path.read_text())) == []


@pytest.mark.parametrize(
    "arguments",
    [{}, {"labelled": False}, {"max_drop": None, "tokens": False}, {"noise": 0.0}],
)
def test_reports_of_every_kind_have_it(
    report_maker: Callable[..., Report], arguments: dict[str, Any]
) -> None:
    assert errors(json.loads(to_json(report_maker(**arguments)))) == []


def test_what_is_wrong_is_found(report: Report) -> None:
    good = json.loads(to_json(report))

    def changed(change: Callable[[Any], object]) -> list[str]:
        bad = copy.deepcopy(good)
        change(bad)
        return errors(bad)

    assert changed(lambda r: r.update(extra=1)) == ["$"]
    assert changed(lambda r: r.pop("verdict")) == ["$"]
    assert changed(lambda r: r.update(schema=2)) == ["$.schema"]
    assert changed(lambda r: r["verdict"].update(outcome="fine")) == ["$.verdict.outcome"]
    assert changed(lambda r: r["layers"][0].update(format=4)) == ["$.layers[0].format"]
    assert changed(lambda r: r["stages"][0].pop("about")) == ["$.stages[0]"]
    assert changed(lambda r: r["clips"]["test"].update(num_clips=1.5)) == ["$.clips.test.num_clips"]
