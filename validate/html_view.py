"""From a report to what its page shows: texts and positions, no markup.

Positions are percentages of the drawing's width, so that one drawing fits a phone and a desk.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from vcompress.validate.closing import find_stage, ties_note
from vcompress.validate.html_generation import generation_view
from vcompress.validate.html_layers import layer_view
from vcompress.validate.html_search import search_view
from vcompress.validate.html_summary import minus, speed_text, ticks, tiles_view, verdict_view
from vcompress.validate.report_types import Engine, Report, Stage
from vcompress.validate.wording import (
    UNKNOWN,
    change_percent,
    fixed,
    mib,
    sample_word,
    short,
    sqnr,
)

__all__ = ["make_view"]


def make_view(report: Report) -> dict[str, Any]:
    """Everything that the template reads, in the order of the page."""
    view = {
        "title": f"{report['model']['name']} \u2192 {report['target']}",
        "model": report["model"],
        "version": report["vcompress"],
        "created": report["created"],
        "command": report["command"],
        "verdict": verdict_view(report),
        "tiles": tiles_view(report),
        "samples": f"{sample_word(report['model']['task'])}s",
        "stages": _stages(report),
        "ties": _ties(report),
        "latency": _latency(report),
        "layers": layer_view(report),
        "search": search_view(report),
        "files": _files(report),
        "tokens": _tokens(report),
        "generation": generation_view(report),
        "engines": [_engine(engine) for engine in report["engines"]],
        "unmeasured": _unmeasured(report),
        "warnings": report["warnings"],
        "facts": _facts(report),
    }
    clean: dict[str, Any] = _tidy(view)
    return clean


def _tidy(value: Any) -> Any:
    """The view without invisible and reordering characters."""
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    if isinstance(value, str):
        # Control and format characters (bidirectional overrides among them) can disguise text.
        return "".join(
            character if unicodedata.category(character) not in ("Cc", "Cf", "Cs") or
            character == "\n" else "\ufffd"
            for character in value
        )  # fmt: skip
    return value


def _stages(report: Report) -> dict[str, Any]:
    classify = any((s["metrics"] or {}).get("agreement_percent") is not None
                   for s in report["stages"])  # fmt: skip
    columns = ["Top-1", "Agreement"] if classify else ["Relative L2"]
    columns += ["Worst cosine", "SQNR", "Parity with previous", "Latency p50"]
    rows = [
        {
            "name": stage["name"], "about": stage["about"], "runtime": stage["runtime"],
            "result": stage["name"] == report["result_stage"],
            "cells": _cells(stage, columns, classify=classify),
        }
        for stage in report["stages"]
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


def _ties(report: Report) -> str:
    agreement = find_stage(report, report["result_stage"]).get("agreement")
    return ties_note(agreement) if agreement and agreement["num_differing"] else ""


def _cells(stage: Stage, columns: list[str], *, classify: bool) -> list[dict[str, Any]]:
    """The numbers of a stage, one cell a column; a reason stands across what it is for."""
    metrics, latency = stage["metrics"], stage["latency"]
    if metrics is None:
        nothing = latency is None and stage["parity"] is None
        width = len(columns) if nothing else len(columns) - 2
        cells = [{**_cell(str(stage["metrics_reason"]), "missing"), "span": width}]
        if nothing:
            return [{**cells[0], "label": ""}]
    else:
        first = [fixed(metrics["relative_l2"], 4)]
        if classify:
            first = [
                fixed(metrics.get("top1_percent"), 2, "%"),
                fixed(metrics.get("agreement_percent"), 2, "%"),
            ]
        cells = [_cell(text) for text in [*first, fixed(metrics["cosine_min"], 4), sqnr(metrics)]]
    cells.append(_parity(stage))
    cells.append(_cell(fixed(latency["p50_ms"], 2, "ms")) if latency else _cell(UNKNOWN))
    labels = columns if metrics is not None else ["", *columns[-2:]]
    return [{**cell, "label": label} for cell, label in zip(cells, labels, strict=True)]


def _cell(text: str, kind: str = "") -> dict[str, Any]:
    if text == UNKNOWN:
        text, kind = "\u2013", "missing"
    return {"text": text, "kind": kind, "symbol": "", "span": 1}


def _parity(stage: Stage) -> dict[str, Any]:
    parity = stage["parity"]
    if parity is None:
        return _cell(UNKNOWN)
    symbol, kind = {"pass": ("\u2713", "pass"), "ties": ("\u2248", "ties"),
                    "fail": ("\u2715", "fail")}[parity["verdict"]]  # fmt: skip
    text = short(parity["relative_l2_max"])
    return {**_cell(text + (" ties" if kind == "ties" else ""), kind), "symbol": symbol}


def _latency(report: Report) -> dict[str, Any]:
    timed = [(s, s["latency"]) for s in report["stages"] if s["latency"] is not None]
    if not timed:
        return {"rows": [], "ticks": [], "modes": []}
    ends = [latency["p90_ms"] or latency["p75_ms"] for _, latency in timed if latency]
    reach = 1.08 * max(ends)

    def at(milliseconds: float) -> float:
        return float(round(100 * milliseconds / reach, 2))

    rows = []
    for stage, latency in timed:
        assert latency is not None
        end = latency["p90_ms"] or latency["p75_ms"]
        rows.append({
            "name": stage["name"], "runtime": stage["runtime"],
            "min": at(latency["min_ms"]), "end": at(end),
            "box": at(latency["p25_ms"]), "p50": at(latency["p50_ms"]),
            "box_width": max(0.3, round(at(latency["p75_ms"]) - at(latency["p25_ms"]), 2)),
            "text": fixed(latency["p50_ms"], 2, "ms"), "speed": _speed(latency),
            "detail": f"p90 {fixed(latency['p90_ms'], 2)}, p99 {fixed(latency['p99_ms'], 2)}, min "
                      f"{fixed(latency['min_ms'], 2)} ms; {latency['num_runs']} runs after "
                      f"{latency['num_warm_up']} warm-up",
        })  # fmt: skip
    shown = [{"at": at(tick), "text": f"{tick:g}"} for tick in ticks(0.0, reach)]
    modes = [mode for stage, _ in timed for mode in _modes(stage)]
    return {"rows": rows, "ticks": shown, "modes": modes}


def _modes(stage: Stage) -> list[dict[str, str]]:
    """A row a way of calling; the memory is that of the stage."""
    memory = stage.get("memory")
    peak = None if memory is None else memory["peak_mib"]
    return [
        {
            "name": stage["name"], "mode": f"{mode['mode']}, {mode['batch_size']} a call",
            "p50": fixed(mode["p50_ms"], 2, "ms"), "p90": fixed(mode["p90_ms"], 2),
            "p99": fixed(mode["p99_ms"], 2),
            "throughput": f"{mode['clips_per_second']:,.1f}",
            "memory": fixed(peak, 1, "MiB") if mode["mode"] == "stream" else "",
        }
        for mode in stage.get("modes") or []
    ]  # fmt: skip


def _speed(latency: dict[str, Any]) -> str:
    speed = latency["speed"]
    if speed is None:
        return ""
    text = f"{speed_text(speed['speed_ratio'])} against {speed['versus']}"
    if speed["speed_ratio_lower"] is None:
        return f"{text} ({speed['num_rounds']} rounds: too few for an interval)"
    return (
        f"{text}, 95 % interval {speed['speed_ratio_lower']:.2f} to "
        f"{speed['speed_ratio_upper']:.2f} over {speed['num_rounds']} interleaved rounds"
    )


def _files(report: Report) -> list[dict[str, str]]:
    return [
        {"path": file["path"], "role": file["role"], "size": mib(file["bytes"])}
        for file in report["sizes"]["files"]
    ]


def _tokens(report: Report) -> dict[str, Any] | None:
    tokens = report["tokens"]
    if tokens is None:
        return None
    first, last = tokens["num_patches_baseline"], tokens["num_patches_result"]
    bars, sites, before = [], [], first
    for index, block in enumerate(tokens["blocks"]):
        left = max(0, block["num_patches"])
        share = round(100 * left / max(1, first), 1)
        # A number stands under the first bar and wherever it changes.
        label = f"{left:,}" if index == 0 or left != before else ""
        bars.append({**block, "height": share, "top": round(100 - share, 1), "label": label})
        if block["technique"]:
            sites.append({
                "block": block["block"], "technique": block["technique"].replace("_", " "),
                "before": f"{before:,}", "after": f"{left:,}", "share": f"{share:.0f} %",
            })  # fmt: skip
        before = left
    used = dict.fromkeys(block["technique"] for block in tokens["blocks"] if block["technique"])
    # A gap between bars that leaves room for the bars themselves.
    gap = 16 / max(1, len(bars))
    return {
        "techniques": ", ".join(name.replace("_", " ") for name in used) or "none",
        "sites": sites,
        "attention": tokens["attention"].replace("_", " "),
        "operations": f"{100 * tokens['flop_share']:.1f}\u00a0%",
        "first": f"{first:,}", "last": f"{last:,}",
        "change": minus(change_percent(first, last)),
        "bars": [{**bar, "x": round(i * (100 + gap) / len(bars), 3)} for i, bar in enumerate(bars)],
        "bar_width": round((100 + gap) / max(1, len(bars)) - gap, 3),
    }  # fmt: skip


def _engine(engine: Engine) -> dict[str, Any]:
    built = engine["status"] == "built"
    return {
        "name": engine["runtime"], "sm": engine["sm"] or "", "status": engine["status"],
        "built": built, "reason": engine["reason"] or "",
        "detail": f"{mib(engine['bytes'])}, built in {fixed(engine['seconds'], 1, 's')}"
        if built else "",
        "command": engine.get("command") or "",
    }  # fmt: skip


def _unmeasured(report: Report) -> list[dict[str, str]]:
    """Everything that has no number, with its reason."""
    found: list[tuple[str, str]] = []
    for stage in report["stages"]:
        quality, speed = stage["metrics_reason"], stage["latency_reason"]
        if quality and quality == speed:
            found.append((f"{stage['name']}: quality and latency", quality))
            continue
        if quality:
            found.append((f"{stage['name']}: quality", quality))
        if speed:
            found.append((f"{stage['name']}: latency", speed))
    found += [(f"{engine['runtime']} engine", engine["reason"] or engine["status"])
              for engine in report["engines"] if engine["status"] != "built"]  # fmt: skip
    skipped = report["clips"]["skipped"]
    found += [(f"Clip {clip['name']}", clip["reason"]) for clip in skipped[:20]]
    if len(skipped) > 20:
        found.append((f"{len(skipped) - 20} more clips", "see report.json"))
    if report["verdict"]["outcome"] == "not judged":
        found.append(("Verdict", report["verdict"]["reason"]))
    return [{"what": what, "why": why} for what, why in found]


def _facts(report: Report) -> list[dict[str, Any]]:
    model, clips, device = report["model"], report["clips"], report["device"]
    calibration = clips["calibration"]
    groups: list[tuple[str, Iterable[tuple[str, Any]]]] = [
        ("Model", [
            ("name", model["name"]), ("family", model["family"]), ("task", model["task"]),
            ("parameters", f"{model['num_parameters']:,}"),
            ("weights sha256", model["weights_sha256"]), ("target", report["target"]),
            ("seed", report["seed"]),
            ("formats read back from", report["precision"]["read_back_from"] or UNKNOWN),
        ]),
        (f"{sample_word(model['task'])}s".capitalize(), [
            ("test", f"{clips['test']['num_clips']:,} from {clips['test']['source']}"),
            ("test sha256", clips["test"]["sha256"]),
            ("calibration", "none" if calibration is None else
             f"{calibration['num_clips']:,} from {calibration['source']}"),
            ("calibration sha256", UNKNOWN if calibration is None else calibration["sha256"]),
            ("skipped", len(clips["skipped"])),
        ]),
        ("Machine", [(key.replace("num_", "").replace("_", " "), value)
                     for key, value in device.items()]),
        ("Versions", report["versions"].items()),
    ]  # fmt: skip
    return [
        {
            "title": title,
            "rows": [
                {
                    "key": key,
                    "value": UNKNOWN if value is None else str(value),
                    "mono": key.endswith("sha256"),
                }
                for key, value in rows
            ],
        }
        for title, rows in groups
    ]
