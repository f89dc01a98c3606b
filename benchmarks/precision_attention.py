"""Section `attention` of `benchmarks/precision.py`: products of attention in eight bits, and time.

Linear layers are rounded to INT8 (target `int8`, ranges of all calibration clips), attentions as
`decide_attention` plans them in one format: alone, and with the linear layers. `auto` chooses among
the formats of the target. `kept` counts the attentions that the plan left in float.

Below that, formats of layers and attentions of the target `mixed` under a budget of time: the share
of the float model's time by the roofline of an RTX 5090, an estimate that ranks formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vcompress.benchmarks.precision_judge import Judge, finite
from vcompress.benchmarks.zoo import BenchModel
from vcompress.calib.observe import observe
from vcompress.compress.attention_plan import decide_attention
from vcompress.compress.attention_sites import apply_attention
from vcompress.compress.block_error import replaced_all
from vcompress.compress.context import PlanContext
from vcompress.compress.frozen import freeze
from vcompress.compress.latency_table import ModelTimes, find_operations
from vcompress.compress.mixed import find_formats
from vcompress.compress.roofline import estimate
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Silent
from vcompress.spec.budget import Budget
from vcompress.spec.defaults import MAX_LAYER_ERROR
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.target import find_target

__all__ = ["measure", "table"]

REQUESTS = ("int8", "fp8", "int8_fp8", "auto")
SHARES = (0.5, 0.35, 0.25)
_TARGET, _TIMED_TARGET = "int8", "mixed"


def measure(bench: BenchModel, *, seed: int) -> dict[str, Any]:
    """Attention formats with and without INT8 layers, and plans under budgets of time."""
    model, judge = bench.model, Judge(bench)
    layers = {name: model.layer(name) for name in model.layers}
    needs = frozenset({"input_amax", "outputs"})
    stats = observe(model, layers, bench.calibration, needs=needs)
    context = PlanContext(
        target=find_target(_TARGET), stats=stats, original=model, calibration=bench.calibration,
        tokens=None, algorithm="max", max_layer_error=MAX_LAYER_ERROR, budget=None, seed=seed,
        stage=Silent().stage, warn=lambda _: None,
    )  # fmt: skip
    linears = {
        name: freeze(model.layer(name), "int8", stats.input_amax[name], name=name)
        for name, facts in model.layers.items()
        if facts.kind == "linear" and name in stats.input_amax and facts.objection("int8") is None
    }
    rows = [{"linears": "int8", "attention": FLOAT, **_judged(model, linears, judge)}]
    target = find_target(_TIMED_TARGET)
    for request in REQUESTS:
        wanted = replace(context, attention=request, target=target)
        planned = model.copy()
        try:
            decided = decide_attention(planned, wanted)
        except InputError as error:
            rows.append({"attention": request, "objection": str(error)})
            continue
        if decided is None:
            continue
        lines, _ = decided
        apply_attention(planned.module, lines)
        facts = {
            "attention": request,
            "formats": dict(Counter(line.format for line in lines.values())),
        }
        for words, frozen in ((FLOAT, {}), ("int8", linears)):
            rows.append({"linears": words, **facts, **_judged(planned, frozen, judge)})
    return {
        **judge.facts(),
        "rows": rows,
        "time": [_timed(model, replace(context, target=target), share, judge) for share in SHARES],
    }


def _judged(model: VideoModel, frozen: Mapping[str, nn.Module], judge: Judge) -> dict[str, Any]:
    with replaced_all(model.module, frozen):
        return judge.judge(model)


def _timed(model: VideoModel, context: PlanContext, share: float, judge: Judge) -> dict[str, Any]:
    """The plan of `mixed` within `share` of the float model's time, attentions in `auto`."""
    operations = find_operations(model)
    formats = tuple(dict.fromkeys((*context.target.formats, *context.target.attention)))
    every = (operation for words in operations.values() for operation in words)
    latency = estimate(every, formats)
    timed = replace(
        context, latency=latency, attention="auto", budget=Budget("latency_share", share)
    )
    working = model.copy()
    decided = decide_attention(working, timed)
    if decided is not None:
        apply_attention(working.module, decided[0])
    try:
        found = find_formats(working, timed)
    except InputError as error:
        return {"share_at_most": share, "objection": str(error)}
    frozen = {
        name: freeze(model.layer(name), each, context.stats.input_amax[name], name=name)
        for name, each in found.formats.items()
        if each != FLOAT
    }
    times = ModelTimes(latency, operations)
    attentions = {} if decided is None else {n: line.format for n, line in decided[0].items()}
    return {
        "share_at_most": share,
        "share": found.evidence["latency_share_by_table"],
        "share_of_attention_in_float": finite(
            sum(times.of(name, FLOAT) or 0.0 for name in attentions) / times.model_seconds
        ),
        "formats": dict(Counter(found.formats.values())),
        "attention": dict(Counter(attentions.values())),
        **_judged(working, frozen, judge),
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Both tables, in Markdown."""
    lines = [
        "| model | linear layers | attention | formats of attentions | SQNR dB | loss | metric |",
        "|---" * 7 + "|",
    ]
    for name, entry in entries.items():
        for row in entry["rows"]:
            if "objection" in row:
                lines.append(f"| {name} | | {row['attention']} | {row['objection']} | | | |")
                continue
            lines.append(
                f"| {name} | {row['linears']} | {row['attention']} | "
                f"{_counted(row.get('formats', {}))} | {_quality(row)} |"
            )
    lines += [
        "",
        "| model | time at most | time | layers | attentions | SQNR dB | loss | metric |",
        "|---" * 8 + "|",
    ]
    for name, entry in entries.items():
        for row in entry["time"]:
            if "objection" in row:
                lines.append(
                    f"| {name} | {row['share_at_most']:.0%} | {row['objection']} |" + " |" * 5
                )
                continue
            lines.append(
                f"| {name} | {row['share_at_most']:.0%} | {row['share']:.1%} | "
                f"{_counted(row['formats'])} | {_counted(row['attention'])} | {_quality(row)} |"
            )
    return "\n".join(lines)


def _counted(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in formats.items())


def _quality(row: Mapping[str, Any]) -> str:
    words = ((row["sqnr_db"], ".1f"), (row["loss"], ".2e"), (row["metric"], ".2f"))
    return " | ".join("not finite" if value is None else f"{value:{how}}" for value, how in words)
