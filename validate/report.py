"""The report: everything that was decided and measured, as one plain dict.

`report_types` defines its shape. It is assembled from parts that were computed elsewhere, checked
once, and is the only thing that the page, the closing table and `report.json` are made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError
from vcompress.validate.agreement import Agreement
from vcompress.validate.closing import closing_notes, closing_table
from vcompress.validate.gate import Verdict
from vcompress.validate.latency import LatencyStatistics
from vcompress.validate.metrics import Metrics
from vcompress.validate.parity import ParityResult
from vcompress.validate.report_types import (
    Clips,
    Engine,
    Generation,
    Layer,
    Memory,
    Mode,
    Model,
    Precision,
    Report,
    Search,
    Sizes,
    Stage,
    Tokens,
)

__all__ = [
    "SCHEMA", "build_report", "build_stage", "closing_notes", "closing_table", "from_json",
    "to_json",
]  # fmt: skip

SCHEMA = 1
# Reports of earlier versions do without.
_LATER_IN_VERDICT = (
    "speed_ratio", "speed_ratio_lower", "speed_ratio_upper", "min_speed_ratio",
)  # fmt: skip

_OBJECTS: tuple[tuple[str, Any], ...] = (
    ("model", Model), ("sizes", Sizes), ("precision", Precision), ("clips", Clips),
)  # fmt: skip
_LISTS: tuple[tuple[str, Any], ...] = (("stages", Stage), ("engines", Engine), ("layers", Layer))


def build_stage(
    name: str,
    *,
    about: str,
    runtime: str | None = None,
    metrics: Metrics | None = None,
    metrics_reason: str | None = None,
    metrics_versus_previous: Metrics | None = None,
    parity: ParityResult | None = None,
    agreement: Agreement | None = None,
    latency: LatencyStatistics | None = None,
    latency_reason: str | None = None,
    batch_size: int | None = None,
    modes: Sequence[Mode] | None = None,
    memory: Memory | None = None,
) -> Stage:
    """One stage of the report; see `report_types.Stage` for the fields."""
    return Stage(
        name=name,
        about=about,
        runtime=runtime,
        metrics=None if metrics is None else dict(metrics),
        metrics_reason=metrics_reason,
        metrics_versus_previous=(
            None if metrics_versus_previous is None else dict(metrics_versus_previous)
        ),
        parity=None if parity is None else parity.as_dict(),
        agreement=None if agreement is None else agreement.as_dict(),
        latency=None if latency is None else latency.as_dict(),
        latency_reason=latency_reason,
        batch_size=batch_size,
        modes=None if modes is None else list(modes),
        memory=memory,
    )


def build_report(
    *,
    vcompress: str,
    created: str,
    command: str,
    seed: int,
    target: str,
    model: Model,
    verdict: Verdict,
    result_stage: str,
    stages: Sequence[Stage],
    sizes: Sizes,
    precision: Precision,
    layers: Sequence[Layer],
    clips: Clips,
    device: Mapping[str, Any],
    versions: Mapping[str, str],
    tokens: Tokens | None = None,
    search: Search | None = None,
    generation: Generation | None = None,
    engines: Sequence[Engine] = (),
    warnings: Sequence[str] = (),
) -> Report:
    """Assemble a report from its parts.

    Args:
        vcompress: version of vcompress.
        created: time of the run, ISO 8601.
        command: what to type to make it again.
        seed: of every random choice.
        target: the deployment target.
        model: what was compressed.
        verdict: of the gate.
        result_stage: name of the stage whose numbers are the result.
        stages: the forms of the model, the baseline first.
        sizes: weights before and after, and the files.
        precision: effective bits before and after.
        layers: every candidate layer, in model order.
        clips: test and calibration clips.
        device: see `latency.describe_device`.
        versions: of the libraries that took part.
        tokens: token merging, if any.
        search: for formats under a budget, if there was one.
        generation: of a denoiser that does not do the same in every step.
        engines: the builds that were tried, or why they were not.
        warnings: what the user should know.

    Returns:
        The report as plain data: numpy scalars are numbers, NaN and infinities are None.

    Raises:
        InputError: a stage is named twice, the result is no stage, or a number is missing
            without a reason.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA, "vcompress": vcompress, "created": created, "command": command,
        "seed": seed, "target": target, "model": model, "verdict": verdict.as_dict(),
        "result_stage": result_stage, "stages": stages, "sizes": sizes, "precision": precision,
        "layers": layers, "tokens": tokens, "engines": engines, "clips": clips,
        "device": device, "versions": versions, "warnings": warnings,
    }  # fmt: skip
    if search is not None:
        report["search"] = search
    if generation is not None:
        report["generation"] = generation
    plain = cast("Report", _plain(report))
    _check_stages(plain, "report")
    return plain


def to_json(report: Report) -> str:
    """The text of `report.json`; NaN and infinities are null."""
    return strict_json.dump(_plain(report))


def from_json(text: str, where: str = "report.json") -> Report:
    """Read a report back.

    Raises:
        InputError: not JSON, another schema, or keys that are missing or unknown.
    """
    data = strict_json.parse(text, where)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else None
        message = f"{where}: schema must be {SCHEMA}, got {got!r}"
        raise InputError(message)
    strict_json.check_keys(
        data, required=Report.__required_keys__, optional=Report.__optional_keys__, where=where
    )
    strict_json.check_keys(
        data["verdict"],
        required=[key for key in Verdict.__dataclass_fields__ if key not in _LATER_IN_VERDICT],
        optional=_LATER_IN_VERDICT,
        where=f"{where}: verdict",
    )
    for section, shape in _OBJECTS:
        strict_json.check_keys(
            data[section],
            required=shape.__required_keys__,
            optional=shape.__optional_keys__,
            where=f"{where}: {section}",
        )
    for section, shape in _LISTS:
        if not isinstance(data[section], list):
            message = f"{where}: {section} must be a list, got {type(data[section]).__name__}"
            raise InputError(message)
        for index, entry in enumerate(data[section]):
            strict_json.check_keys(
                entry,
                required=shape.__required_keys__,
                optional=shape.__optional_keys__,
                where=f"{where}: {section}[{index}]",
            )
    report = cast("Report", data)
    _check_stages(report, where)
    return report


def _check_stages(report: Report, where: str) -> None:
    names = [stage["name"] for stage in report["stages"]]
    if len(set(names)) != len(names) or report["result_stage"] not in names:
        message = (
            f"{where}: result_stage must be one of the stages, which need different names; got "
            f"{report['result_stage']!r} and {', '.join(names)}"
        )
        raise InputError(message)
    for stage in report["stages"]:
        for what, value, reason in (
            ("metrics", stage["metrics"], stage["metrics_reason"]),
            ("latency", stage["latency"], stage["latency_reason"]),
        ):
            if (value is None) != bool(reason):
                message = (
                    f"{where}: stage {stage['name']} needs either {what} or {what}_reason, got "
                    f"{'neither' if value is None else 'both'}"
                )
                raise InputError(message)


def _plain(value: Any) -> Any:
    """`value` as what JSON knows, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    message = f"a report holds plain data, got {type(value).__name__}: {value!r}"
    raise InputError(message)
