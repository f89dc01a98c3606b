"""The closing table: what a run comes to, in a dozen lines on a terminal."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

from vcompress.validate.report_types import Generation, Report, Stage
from vcompress.validate.wording import (
    UNKNOWN,
    change_percent,
    fixed,
    sample_word,
    sqnr,
    times,
    weights_mib,
)

__all__ = ["closing_notes", "closing_table", "find_stage", "latency_baseline", "ties_note"]

Row = tuple[str, str, str, str]
# (key of the metrics, label with unit, decimals)
_TASK_ROWS = (
    ("calibration_error_percent", "calibration error (pt)", 2),
    ("average_precision_percent", "average precision (%)", 2),
    ("psnr_db", "PSNR to baseline (dB)", 2),
    ("ssim", "SSIM to baseline", 4),
    ("flicker_percent", "flicker (% of range)", 3),
    ("motion_error_px", "motion error (px)", 3),
)


def find_stage(report: Report, name: str) -> Stage:
    """The stage called `name`."""
    return next(stage for stage in report["stages"] if stage["name"] == name)


def latency_baseline(report: Report) -> Stage:
    """The stage that the result's speed is measured against: by default the first."""
    speed = (find_stage(report, report["result_stage"])["latency"] or {}).get("speed") or {}
    names = {stage["name"] for stage in report["stages"]}
    versus = speed.get("versus")
    return find_stage(report, versus) if versus in names else report["stages"][0]


def closing_table(report: Report) -> list[Row]:
    """Rows of (label with unit, baseline, result, change and remark), plain ASCII text.

    A row is there even where its number is not: then it says `n/a` and why.
    """
    sizes, precision = report["sizes"], report["precision"]
    before, after = sizes["baseline_weights_mib"], sizes["result_weights_mib"]
    rows: list[Row] = [
        ("weights (MiB)", weights_mib(before), weights_mib(after), change_percent(before, after)),
        (
            "effective bits",
            fixed(precision["baseline_effective_bits"], 2),
            fixed(precision["result_effective_bits"], 2),
            "scales counted",
        ),
    ]
    tokens = report["tokens"]
    if tokens is not None:
        first, last = tokens["num_patches_baseline"], tokens["num_patches_result"]
        rows.append(("tokens", str(first), str(last), change_percent(first, last)))
        rows.append(("operations", "100 %", f"{100 * tokens['flop_share']:.1f} %", "by formula"))
    return [
        *rows, *_latency_rows(report), *_quality_rows(report), *_generation_rows(report)
    ]  # fmt: skip


def _latency_rows(report: Report) -> list[Row]:
    baseline, result = latency_baseline(report), find_stage(report, report["result_stage"])
    old, new = baseline["latency"] or {}, result["latency"]
    label = "latency p50 (ms)"
    if result["batch_size"] is not None:
        label = f"latency p50 (ms, B={result['batch_size']})"
    if new is None:
        return [(label, fixed(old.get("p50_ms"), 2), UNKNOWN, str(result["latency_reason"]))]
    remark = f"{new['num_runs']} runs after {new['num_warm_up']} warm-up"
    speed = new.get("speed")
    if speed is not None:
        interval = ""
        if speed["speed_ratio_lower"] is not None:
            interval = f" [{speed['speed_ratio_lower']:.2f}, {speed['speed_ratio_upper']:.2f}]"
        remark = f"{times(speed['speed_ratio'])}{interval}  {remark}"
    rows = [(label, fixed(old.get("p50_ms"), 2), fixed(new["p50_ms"], 2), remark)]
    if new["p90_ms"] is not None:
        change = change_percent(old.get("p90_ms"), new["p90_ms"])
        rows.append(
            ("latency p90 (ms)", fixed(old.get("p90_ms"), 2), fixed(new["p90_ms"], 2), change)
        )
    return rows


def _quality_rows(report: Report) -> list[Row]:
    result = find_stage(report, report["result_stage"])
    metrics = result["metrics"]
    if metrics is None:
        return [("quality", UNKNOWN, UNKNOWN, str(result["metrics_reason"]))]
    rows: list[Row] = []
    gate = _gate_remark(report)
    clips = f"{metrics['num_clips']} clips"
    if metrics.get("top1_percent") is not None:
        change = fixed(-metrics["top1_drop_points"], 2, "pt")
        change = change if change.startswith(("-", "0.00")) else f"+{change}"
        rows.append((
            f"top-1 (%, {clips})",
            fixed(metrics["baseline_top1_percent"], 2),
            fixed(metrics["top1_percent"], 2),
            f"{change}  {gate}".rstrip(),
        ))  # fmt: skip
        gate = ""
    if metrics.get("agreement_percent") is not None:
        agreement = fixed(metrics["agreement_percent"], 2)
        rows.append((f"agreement (%, {clips})", "100.00", agreement, gate))
        gate = ""
    rows += [
        (label, _number(metrics, f"baseline_{key}", digits), _number(metrics, key, digits), "")
        for key, label, digits in _TASK_ROWS
        if metrics.get(key) is not None
    ]
    worst = f"cosine, worst {sample_word(report['model']['task'])}"
    rows.append((worst, "1.0000", fixed(metrics["cosine_min"], 4), gate))
    rows.append(("SQNR of outputs", "", sqnr(metrics), ""))
    return rows


def _generation_rows(report: Report) -> list[Row]:
    found = report.get("generation")
    if found is None:
        return []
    rows: list[Row] = []
    if found["skip_percent"] is not None:
        speed = "" if found["speed_ratio"] is None else f"{times(found['speed_ratio'])} in torch"
        skipped = fixed(100 - found["skip_percent"], 1, "%")
        rows.append(("blocks computed over the steps", "100 %", skipped, speed))
    if found["psnr_db"] is not None:
        number = len(found["psnr_db"])
        clips = f"{number} clip{'' if number == 1 else 's'}"
        alone = found["precision_alone_psnr_db"]
        remark = f"lowest {min(found['psnr_db']):.2f}"
        if alone is not None and found["cache_policy"] is not None:
            remark += f"; {mean(alone):.2f} without the cache"
        rows.append(
            (f"PSNR of generated clips (dB, {clips})", "", fixed(mean(found["psnr_db"]), 2), remark)
        )
    return rows


def _number(metrics: dict[str, Any], key: str, digits: int) -> str:
    return fixed(metrics[key], digits) if metrics.get(key) is not None else ""


def _gate_remark(report: Report) -> str:
    verdict = report["verdict"]
    bar: Any = verdict["max_drop_points"]
    unit = "pt"
    if bar is None:
        bar, unit = verdict["min_sqnr_db"], "dB"
    bars = [] if bar is None else [f"{bar:.2f} {unit}"]
    if verdict.get("min_speed_ratio") is not None:
        bars.append(f"{verdict['min_speed_ratio']:g}x")
    return f"gate{''.join(f' {each}' for each in bars)}: {verdict['outcome']}"


def closing_notes(report: Report) -> list[tuple[str, str]]:
    """What stands below the table: (word, text) for layers, tokens, engines and the verdict."""
    counts = Counter(layer["format"] for layer in report["layers"])
    notes = [("layers", ", ".join(f"{count} {name}" for name, count in counts.most_common()))]
    tokens = report["tokens"]
    if tokens is not None:
        used = [block["technique"] for block in tokens["blocks"] if block["technique"]]
        places = f"{len(used)} place{'' if len(used) == 1 else 's'}"
        text = f"{', '.join(dict.fromkeys(used)) or 'none'}, at {places}"
        notes.append(("tokens", f"{text}; {tokens['attention'].replace('_', ' ')} attention"))
    generation = report.get("generation")
    if generation is not None:
        notes += _generation_notes(generation)
    for engine in report["engines"]:
        name = engine["runtime"] + (f" SM{engine['sm']}" if engine["sm"] else "")
        text = (
            engine["status"]
            if engine["reason"] is None
            else (f"{engine['status']}: {engine['reason']}")
        )
        notes.append(("engine", f"{name} {text}"))
    agreement = find_stage(report, report["result_stage"]).get("agreement")
    if agreement is not None and agreement["num_differing"]:
        notes.append(("ties", ties_note(agreement)))
    skipped = report["clips"]["skipped"]
    if skipped:
        notes.append(("clips", f"{len(skipped)} skipped, first: {skipped[0]['name']} "
                               f"({skipped[0]['reason']})"))  # fmt: skip
    notes += [("warning", text) for text in report["warnings"]]
    return [*notes, ("verdict", f"{report['verdict']['outcome']}. {report['verdict']['reason']}")]


def _generation_notes(found: Generation) -> list[tuple[str, str]]:
    notes = []
    if found["cache_policy"] is not None:
        steps = "" if found["num_steps"] is None else f" over {found['num_steps']} steps"
        notes.append(("cache", f"{found['cache_policy']}{steps}"))
    elif found["cache_reason"] is not None:
        notes.append(("cache", f"none: {found['cache_reason']}"))
    if found["four_bit_percent"] is not None:
        share = fixed(found["four_bit_percent"], 0, "%")
        notes.append(("inputs", f"four bits for {share} of the work, eight for the rest"))
    elif found["precision_reason"] is not None:
        notes.append(("inputs", f"the same in every step: {found['precision_reason']}"))
    return notes


def ties_note(agreement: dict[str, Any]) -> str:
    """One line on the clips that the file answers otherwise than its module."""
    looked_at = agreement["num_looked_at"]
    seen = "all" if looked_at == agreement["num_differing"] else f"all {looked_at} looked at"
    return (
        f"{agreement['num_differing']} of {agreement['num_clips']} clips have another top class in "
        f"the file than in torch; in {seen} of them rounding ties are shown to be what differs"
    )
