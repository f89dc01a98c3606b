"""The JSON Schema of `report.json`, made from the types that the report is checked against.

The file `schemas/report.schema.json` is what is published; a test compares it with this. After a
change of the types: `python -m vcompress.validate.report_schema`.
"""

# Nothing is imported for type checkers only: the annotations of the types are read at run time.
import dataclasses
import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from vcompress.spec import strict_json
from vcompress.validate.gate import Verdict
from vcompress.validate.report_types import Report

__all__ = ["SCHEMA_FILE", "report_schema"]

SCHEMA_FILE = Path(__file__).parent / "schemas" / "report.schema.json"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"}, bool: {"type": "boolean"}, int: {"type": "integer"},
    float: {"type": "number"}, type(None): {"type": "null"}, Any: {},
}  # fmt: skip
_NUMBER = {"type": ["number", "null"]}
_NUMBERS = ("mean_ms", "min_ms", "p25_ms", "p50_ms", "p75_ms", "iqr_ms")
# What is a plain mapping for Python, and has a shape of its own in the file.
_METRICS: dict[str, Any] = {
    "description": "By metric; the unit stands in the name. Null where it is not defined.",
    "type": "object",
    "required": ["num_clips"],
    "additionalProperties": {"type": ["number", "boolean", "null", "string", "object", "array"]},
}
_LATENCY: dict[str, Any] = {
    "description": "Wall clock of a call after warm-up; see the docstring of LatencyStatistics.",
    "type": "object",
    "required": ["num_runs", "num_warm_up", *_NUMBERS, "p90_ms", "p99_ms", "speed"],
    "properties": {
        "num_runs": {"type": "integer"}, "num_warm_up": {"type": "integer"},
        **{name: {"type": "number"} for name in _NUMBERS}, "p90_ms": _NUMBER, "p99_ms": _NUMBER,
        "speed": {
            "type": ["object", "null"],
            "required": ["versus", "speed_ratio", "num_rounds"],
            "properties": {
                "versus": {"type": "string"}, "speed_ratio": {"type": "number"},
                "speed_ratio_lower": _NUMBER, "speed_ratio_upper": _NUMBER,
                "num_rounds": {"type": "integer"},
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}  # fmt: skip
_PARITY: dict[str, Any] = {
    "description": "Of the outputs of two forms of one model, which should compute the same.",
    "type": "object",
    "required": ["verdict", "relative_l2_max"],
    "properties": {
        "verdict": {"enum": ["pass", "ties", "fail"]}, "relative_l2_max": _NUMBER,
    },
}  # fmt: skip
_COUNTS = ("num_clips", "num_differing", "num_looked_at", "num_tied")
_PERCENTS = ("agreement_percent", "agreement_ties_shown_percent")
_AGREEMENT: dict[str, Any] = {
    "description": "How often two forms of a classifier name the same class.",
    "type": "object",
    "required": ["verdict", *_COUNTS, "agreement_percent"],
    "properties": {
        "verdict": {"enum": ["pass", "ties", "fail"]},
        **{name: {"type": "integer"} for name in _COUNTS},
        **{name: {"type": "number"} for name in _PERCENTS},
    },
    "additionalProperties": False,
}  # fmt: skip
_SHAPES: dict[tuple[str, str], dict[str, Any]] = {
    ("Stage", "metrics"): _METRICS, ("Stage", "metrics_versus_previous"): _METRICS,
    ("Stage", "latency"): _LATENCY, ("Stage", "parity"): _PARITY,
    ("Stage", "agreement"): _AGREEMENT,
}  # fmt: skip


def report_schema() -> dict[str, Any]:
    """The schema, as plain data in the order of the file."""
    definitions: dict[str, Any] = {}
    root = _object(Report, definitions)
    root["properties"]["schema"] = {"const": 1}
    root["properties"]["verdict"] = _object(Verdict, definitions, optional=_since_first(Verdict))
    return {
        "$schema": _DIALECT,
        "title": "report.json of a vcompress artifact, schema 1",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _since_first(shape: type) -> set[str]:
    """Fields of the verdict that reports of earlier versions do without."""
    return {field.name for field in dataclasses.fields(shape) if "speed" in field.name}


def _object(
    shape: Any, definitions: dict[str, Any], optional: set[str] | None = None
) -> dict[str, Any]:
    """The schema of a typed dictionary or a dataclass."""
    hints = get_type_hints(shape, include_extras=True)
    left_out = set(getattr(shape, "__optional_keys__", ())) | (optional or set())
    properties = {}
    for name, hint in hints.items():
        known = _SHAPES.get((shape.__name__, name))
        if get_origin(hint) in (NotRequired, Required):
            (hint,) = get_args(hint)
        properties[name] = _nullable(known) if known else _schema(hint, definitions)
    return {
        "description": inspect.cleandoc(shape.__doc__ or "").split("\n\n")[0].replace("\n", " "),
        "type": "object",
        "required": [name for name in hints if name not in left_out],
        "properties": properties,
        "additionalProperties": False,
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union([_schema(each, definitions) for each in arguments])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if hint.__name__ not in definitions:
        # Named first: a type may hold itself.
        definitions[hint.__name__] = {}
        definitions[hint.__name__] = _object(hint, definitions)
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _union(options: list[dict[str, Any]]) -> dict[str, Any]:
    if all(list(option) == ["type"] for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": options}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


if __name__ == "__main__":
    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    SCHEMA_FILE.write_text(strict_json.dump(report_schema()), encoding="utf-8")
