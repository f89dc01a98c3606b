"""The first screen of the page: the verdict, its interval on an axis, and the four tiles."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

from vcompress.validate.closing import find_stage, latency_baseline
from vcompress.validate.report_types import Report
from vcompress.validate.wording import (
    UNKNOWN,
    change_percent,
    fixed,
    sample_word,
    times,
    weights_mib,
)

__all__ = ["minus", "speed_text", "ticks", "tiles_view", "verdict_view"]

_OUTCOMES = {
    "pass": ("Pass", "\u2713"),
    "fail": ("Fail", "\u2715"),
    "inconclusive": ("Inconclusive", "?"),
    "not judged": ("Not judged", "\u2013"),
}


def minus(text: str) -> str:
    """`text` with a leading hyphen as a minus sign."""
    return "\u2212" + text[1:] if text.startswith("-") else text


def tiles_view(report: Report) -> list[dict[str, Any]]:
    """Quality, size, latency and bits of the result; of a denoiser with a cache that, too."""
    tiles = [_quality_tile(report), _size_tile(report), _latency_tile(report), _bits_tile(report)]
    return [*tiles, *_generation_tiles(report)]


def verdict_view(report: Report) -> dict[str, Any]:
    """The outcome in a word, a symbol and a sentence, and the interval to draw."""
    verdict = report["verdict"]
    word, symbol = _OUTCOMES[verdict["outcome"]]
    return {
        "word": word,
        "symbol": symbol,
        "kind": verdict["outcome"].split()[0],
        "reason": verdict["reason"],
        "interval": _interval(verdict),
    }


def _interval(verdict: dict[str, Any]) -> dict[str, Any] | None:
    """The drop with its bounds on an axis in points, and the bar."""
    if verdict["drop_points"] is None:
        return None
    value, bar = verdict["drop_points"], verdict["max_drop_points"]
    lower, upper = verdict["drop_points_lower"], verdict["drop_points_upper"]
    low, high = min(0.0, lower, value), max(upper, bar, value)
    reach = (high - low) or 1.0
    low, high = low - 0.08 * reach, high + 0.12 * reach

    def at(points: float) -> float:
        return float(round(100 * (points - low) / (high - low), 2))

    named = "drop" if verdict["metric"] == "top1_drop" else "disagreement"
    return {
        "value": at(value), "lower": at(lower), "upper": at(upper), "bar": at(bar),
        "width": round(at(upper) - at(lower), 2), "zero": at(0.0),
        "bar_text": f"bar {bar:g} pt",
        "text": minus(f"{value:.2f} pt"),
        "about": f"Top-1 {named}, observed value and one-sided 95 % bounds",
        "lower_text": minus(f"{lower:.2f}"), "upper_text": minus(f"{upper:.2f}"),
        "ticks": [{"at": at(tick), "text": minus(f"{tick:g}")} for tick in ticks(low, high)],
    }  # fmt: skip


def ticks(low: float, high: float) -> list[float]:
    """About five round values from `low` to `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    # Adding zero turns -0.0 into 0.0.
    return [round(n * step, 10) + 0.0 for n in range(first, math.floor(high / step) + 1)]


def _keep(text: str) -> str:
    """A number stays on one line with its unit."""
    return text.replace(" ", "\u00a0")


def _tile(
    label: str, value: str, unit: str, before: str, change: str, note: str = ""
) -> dict[str, Any]:
    return {
        "label": label, "value": value, "unit": unit, "before": _keep(before),
        "change": _keep(minus(change)),
        "note": note, "share": None, "missing": value == UNKNOWN,
    }  # fmt: skip


def _quality_tile(report: Report) -> dict[str, Any]:
    result = find_stage(report, report["result_stage"])
    metrics = result["metrics"]
    if metrics is None:
        return _tile("Accuracy", UNKNOWN, "", "", "", str(result["metrics_reason"]))
    clips = f"{metrics['num_clips']:,} test {sample_word(report['model']['task'])}s"
    if metrics.get("top1_percent") is not None:
        change = fixed(-metrics["top1_drop_points"], 2, "pt")
        if not change.startswith("-"):
            change = f"\u00b1{change}" if change.startswith("0.00") else f"+{change}"
        before = fixed(metrics["baseline_top1_percent"], 2, "%")
        return _tile(
            "Top-1 accuracy", fixed(metrics["top1_percent"], 2), "%", before, change, clips
        )
    if metrics.get("agreement_percent") is not None:
        note = f"{clips}, no labels"
        return _tile("Top-1 agreement", fixed(metrics["agreement_percent"], 2), "%", "", "", note)
    if metrics["identical"]:
        return _tile("Outputs", "identical", "", "", "", clips)
    note = f"of the outputs against the baseline, {clips}"
    return _tile("SQNR", fixed(metrics["sqnr_db"], 1), "dB", "", "", note)


def _generation_tiles(report: Report) -> list[dict[str, Any]]:
    found = report.get("generation")
    if found is None:
        return []
    tiles = []
    if found["psnr_db"]:
        number = len(found["psnr_db"])
        clips = f"{number} held-out clip{'' if number == 1 else 's'}"
        note = f"mean of {clips}, lowest {min(found['psnr_db']):.2f}"
        tiles.append(_tile("Generated clips", fixed(mean(found["psnr_db"]), 1), "dB", "", "", note))
    if found["skip_percent"] is not None:
        note = f"{fixed(found['skip_percent'], 0, '%')} of block calls reused"
        speed = UNKNOWN
        if found["speed_ratio"] is not None:
            speed = f"{found['speed_ratio']:.2f}\u00d7"
            note += "; a generation in torch, without and with the cache"
        tiles.append(_tile("Speed of the cache", speed, "", "", "", note))
    return tiles


def _size_tile(report: Report) -> dict[str, Any]:
    sizes = report["sizes"]
    before, after = sizes["baseline_weights_mib"], sizes["result_weights_mib"]
    note = f"{before / after:.2f}\u00d7 smaller" if 0 < after < before else ""
    tile = _tile(
        "Weights", weights_mib(after), "MiB", weights_mib(before, "MiB"),
        change_percent(before, after), note,
    )  # fmt: skip
    return {**tile, "share": _share(after, before)}


def _bits_tile(report: Report) -> dict[str, Any]:
    precision = report["precision"]
    before, after = precision["baseline_effective_bits"], precision["result_effective_bits"]
    note = "a parameter, scales counted"
    tile = _tile("Effective bits", fixed(after, 2), "", fixed(before, 2), "", note)
    return {**tile, "share": _share(after, before)}


def _share(after: float | None, before: float | None) -> float | None:
    if after is None or not before:
        return None
    return round(min(100.0, 100 * after / before), 1)


def _latency_tile(report: Report) -> dict[str, Any]:
    result = find_stage(report, report["result_stage"])
    new, old = result["latency"], latency_baseline(report)["latency"]
    before = "" if old is None else fixed(old["p50_ms"], 2, "ms")
    if new is None:
        return _tile("Latency p50", UNKNOWN, "", before, "", str(result["latency_reason"]))
    note = f"{new['num_runs']} runs"
    if result["batch_size"] is not None:
        note += f", batch {result['batch_size']}"
    change = "" if new["speed"] is None else speed_text(new["speed"]["speed_ratio"])
    tile = _tile("Latency p50", fixed(new["p50_ms"], 2), "ms", before, change, note)
    return {**tile, "share": _share(new["p50_ms"], old["p50_ms"] if old else None)}


def speed_text(ratio: float | None) -> str:
    """A speed ratio with a multiplication sign."""
    return times(ratio).replace("x", "\u00d7", 1)
