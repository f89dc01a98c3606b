"""What `benchmarks.diffusion` measured, as JSON, as a plot and as the table of docs/caching.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

__all__ = ["Line", "Results", "put", "table", "verdict"]

_TOP = 60.0  # dB; what is closer looks the same

Line = dict[str, Any]


class Results:
    """Lines of the table, on disk at every moment."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.lines: list[Line] = []

    @classmethod
    def load(cls, path: Path) -> Results:
        """Those at `path`, to be gone on with."""
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        lines = stored.pop("lines")
        del stored["verdict"]
        results = cls(path, stored)
        results.lines = lines
        return results

    def summaries(self) -> list[Line]:
        """What is known, with means."""
        return [_summary(line) for line in self.lines]

    def text(self) -> str:
        """What a page says: how it was measured, the outcome, and the table."""
        known, facts = self.summaries(), self.facts
        said = verdict(known, facts["bar_psnr_db"])
        lines = [
            f"{facts['num_steps']} steps; searched on {len(facts['calibration'])} clips, "
            f"confirmed on {len(facts.get('confirmed', ()))}, judged on "
            f"{len(facts['held_out'])} others, of which {facts['num_timed']} timed; "
            f"{facts['threads']} thread."
        ]
        if "again" in facts:
            timed, names = facts["again"]["num_timed"], facts["again"]["lines"]
            lines.append(f"Judged again on these, {timed} of them timed: {', '.join(names)}.")
        if said["automatic"]:
            lines.append(
                f"Chosen: {said['automatic']}, {said['speed_up']:.2f}x at {said['psnr_db']:.1f} dB."
            )
        if said.get("best_peer"):
            lines.append(
                f"The fastest peer that reaches {facts['bar_psnr_db']:g} dB there: "
                f"{said['best_peer']}, {said['best_peer_speed_up']:.2f}x."
            )
        return " ".join(lines) + "\n\n" + table(known)

    def save(self) -> None:
        """Write it."""
        known = self.summaries()
        data = {**self.facts, "verdict": verdict(known, self.facts["bar_psnr_db"]), "lines": known}
        self.path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.text())
        plot(known, self.facts["bar_psnr_db"], self.path.with_suffix(".png"))


def _summary(line: Line) -> Line:
    """A line with the means of what its clips gave."""
    if not line.get("psnr_db"):
        return line
    return {
        **line, "mean_psnr_db": mean(line["psnr_db"]), "worst_psnr_db": min(line["psnr_db"]),
        "mean_ssim": mean(line["ssim"]),
        "speed_up": median(line["speed_ups"]) if line["speed_ups"] else None,
        "processor_speed_up": median(line["processor_speed_ups"]) if line["speed_ups"] else None,
    }  # fmt: skip


def verdict(lines: Sequence[Line], bar: float) -> dict[str, Any]:
    """The automatic choice against the fastest peer whose clips reach the bar."""
    chosen = [line for line in lines if line.get("automatic") and line.get("speed_up")]
    holding = [
        line for line in lines
        if line["whose"] == "peer" and line.get("speed_up") and line["mean_psnr_db"] >= bar
    ]  # fmt: skip
    if not chosen:
        return {"automatic": None}
    ours, best = chosen[0], max(holding, key=lambda line: float(line["speed_up"]), default=None)
    return {
        "automatic": ours["name"], "speed_up": ours["speed_up"], "psnr_db": ours["mean_psnr_db"],
        "holds": ours["mean_psnr_db"] >= bar,
        "best_peer": best and f"{best['name']} {best['setting']}",
        "best_peer_speed_up": best and best["speed_up"],
        "is_ahead": ours["mean_psnr_db"] >= bar
        and (best is None or ours["speed_up"] >= best["speed_up"]),
    }  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = [
        "| cache | setting | speed-up | skipped | PSNR dB, held out | worst clip | SSIM | "
        "PSNR dB, calibration |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        name = f"**{line['name']}**" if line.get("automatic") else line["name"]
        if not line.get("psnr_db"):
            rows.append(f"| {name} | {line.get('error', line.get('setting', ''))} | | | | | | |")
            continue
        speed = "" if line["speed_up"] is None else f"{line['speed_up']:.2f}x"
        skipped = f"{line['skip_rate']:.0%}" if "skip_rate" in line else ""
        seen = line.get("calibration_psnr_db")
        rows.append(
            f"| {name} | {line['setting']} | {speed} | {skipped} | {line['mean_psnr_db']:.1f} | "
            f"{line['worst_psnr_db']:.1f} | {line['mean_ssim']:.4f} | "
            f"{'' if seen is None else f'{seen:.1f}'} |"
        )
    return "\n".join(rows) + "\n"


def put(text: str, document: Path, *, name: str = "diffusion") -> None:
    """Replace what stands between the two marks of the table `name` in `document`."""
    begin, end = (f"<!-- {name} table: {edge} -->" for edge in ("begin", "end"))
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        message = f"{document} has no marks {begin} and {end}"
        raise SystemExit(message)
    document.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")


def plot(lines: Sequence[Line], bar: float, path: Path) -> None:
    """Speed-up against PSNR, ours as dots and peers as crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    shown: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.get("speed_up"):
            shown.setdefault((line["whose"], line["name"]), []).append(line)
    for index, ((whose, name), points) in enumerate(shown.items()):
        points.sort(key=lambda line: float(line["speed_up"]))
        values = [min(_TOP, line["mean_psnr_db"]) for line in points]
        speeds = [line["speed_up"] for line in points]
        style = {"marker": "o"} if whose == "vcompress" else {"marker": "x", "linestyle": "--"}
        axes.plot(speeds, values, label=name, color=f"C{index % 10}", **style)
        for line, speed, value in zip(points, speeds, values, strict=True):
            worst = min(value, line["worst_psnr_db"])
            axes.plot([speed, speed], [worst, value], color=f"C{index % 10}", alpha=0.3)
            if line.get("automatic"):
                axes.plot(speed, value, marker="*", markersize=18, color="black", zorder=-1)
    axes.axhline(bar, color="black", linewidth=0.8)
    axes.axvline(2.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up in wall clock, interleaved (x)")
    axes.set_ylabel(f"PSNR against the full model, held-out clips (dB, at most {_TOP:g})")
    axes.set_title("dots: vcompress; crosses: peers; star: chosen; bars down to the worst clip")
    if shown:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
