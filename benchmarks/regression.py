"""How often is the verdict of `vcompress bench` right, and that of the gate? On real recordings.

    python benchmarks/regression.py record CONDITION --artifact OUT --seconds 170 [--program]
    python benchmarks/regression.py accuracy
    python benchmarks/regression.py          # resamples what was recorded, and prints the tables

OUT is what `vcompress quantize reference:penvideo20 --target int8 --calib reference:penvideo20`
made. A recording is a series of process pairs, exactly those that `vcompress bench` times: its
graph against itself in ten interleaved quads a pair, each pair two fresh processes. CONDITION says
what else the machine did: `alone`; `loaded` (a second process, started here, that keeps a core busy
with products of matrices); `shared` (whatever else was running). With --program every third pair
is one of a slower program: the second process calls the graph 105 times where 100 are counted.

A run of `vcompress bench` is then drawn from a series: blocks of three consecutive pairs, at random
with replacement, judged by the product's own rule at 6, 9 and 12 pairs, its control included. A
slow-down is injected by adding its logarithm to the second arm of every quad. Where pairs of the
slower program were recorded, nothing is injected: they are drawn as they are.

`accuracy` takes the answers of baseline and artifact on every test clip of penvideo20, as
`benchmarks/reference_models.py` counted them, and draws clips from them with replacement; a drop is
injected by making right answers wrong at random. The control has the answers of baseline and
artifact exchanged on half of the clips where they differ, so that its true drop is zero.
`benchmarks/results/regression.json` keeps it all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RESULTS = Path(__file__).parent / "results" / "regression.json"
CONDITIONS = ("alone", "loaded", "shared")
SLOWDOWNS = (0.0, 0.01, 0.02, 0.025, 0.03, 0.04, 0.05, 0.07, 0.10)
DROPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
BARS = (0.5, 1.0)
TARGETS = ("int8", "nvfp4")
RUNS = 2000
BLOCK = 3
CONTROL_PAIRS = 3
FloatArray = npt.NDArray[np.float64]

_LOAD = """
import numpy
a = numpy.random.default_rng(0).standard_normal((512, 512))
while True:
    a @ a
"""


@contextmanager
def second_process(wanted: bool) -> Iterator[None]:
    """A process that keeps a core busy, where the system puts it."""
    if not wanted:
        yield
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    load = subprocess.Popen([sys.executable, "-c", _LOAD], env={**os.environ, **threads})
    try:
        time.sleep(1)
        yield
    finally:
        load.terminate()
        load.wait()


def record(condition: str, artifact: Path, seconds: float, path: Path, *, program: bool) -> None:
    """Time pairs for `seconds`, and add them to the results at `path`, ten at a time."""
    from dataclasses import replace

    from vcompress.pipeline.bench import arm_of
    from vcompress.pipeline.process_pairs import measure_pairs
    from vcompress.pipeline.run import Silent
    from vcompress.validate.latency import describe_device

    with tempfile.TemporaryDirectory() as folder, second_process(condition == "loaded"):
        arm = arm_of(artifact, Path(folder) / "clip.npz")
        slower = replace(arm, repeat=105)
        started, index = time.monotonic(), 0
        series: list[dict[str, Any]] = []
        while time.monotonic() - started < seconds:
            second = slower if program and index % 3 == 2 else arm
            before = time.monotonic()
            quads = measure_pairs(arm, second, 1, Silent(), "", first=index)[0]
            series.append({
                "condition": condition, "work_percent": second.repeat,
                "seconds": round(time.monotonic() - before, 2),
                "load_average_1min": round(os.getloadavg()[0], 2),
                "quads": [round(float(value), 6) for value in quads],
            })  # fmt: skip
            index += 1
            if len(series) == 10:
                _keep(path, series, describe_device(1))
                series = []
        _keep(path, series, describe_device(1))


def _keep(path: Path, series: list[dict[str, Any]], device: dict[str, Any]) -> None:
    results = _read(path)
    results["pairs"] = [*results.get("pairs", []), *series]
    results["device"] = device
    _write(path, results)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(path: Path, results: dict[str, Any]) -> None:
    lines = {key: json.dumps(value) for key, value in results.items() if key != "pairs"}
    pairs = ",\n  ".join(json.dumps(pair) for pair in results.get("pairs", []))
    lines["pairs"] = f"[\n  {pairs}\n ]"
    path.write_text("{\n" + ",\n".join(f' "{k}": {v}' for k, v in lines.items()) + "\n}\n")


def draw(series: FloatArray, runs: int, pairs: int, rng: np.random.Generator) -> FloatArray:
    """`[runs, pairs, quads]` in blocks of consecutive pairs of `series [all pairs, quads]`."""
    starts = rng.integers(0, len(series), (runs, math.ceil(pairs / BLOCK), 1))
    chosen = (starts + np.arange(BLOCK)).reshape(runs, -1)[:, :pairs] % len(series)
    drawn: FloatArray = series[chosen]
    return drawn


def judged(runs: FloatArray, controls: FloatArray) -> dict[str, Any]:
    """What the rule says of each run, and how many pairs it takes."""
    from vcompress.validate.regression import LOOKS, decide, estimate

    outcomes, taken = Counter[str](), []
    for run, control in zip(runs, controls, strict=True):
        for look in LOOKS:
            outcome = decide(estimate(run[:look]), last=look == LOOKS[-1])
            if outcome is not None:
                break
        assert outcome is not None
        taken.append(look)
        if outcome == "regression" and abs(estimate(control).log_ratio) > math.log(1.025):
            outcome = "inconclusive"
        outcomes[outcome] += 1
    return {
        "runs": len(runs), **{word: outcomes[word] for word in
                              ("pass", "regression", "inconclusive")},
        "mean_pairs": round(float(np.mean(taken)), 2),
    }  # fmt: skip


def verdicts(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """For every condition: outcomes by injected slow-down, and of the program that is slower."""
    found: dict[str, Any] = {}
    for condition in CONDITIONS:
        of = [pair for pair in pairs if pair["condition"] == condition]
        same = np.array([pair["quads"] for pair in of if pair["work_percent"] == 100])
        slower = np.array([pair["quads"] for pair in of if pair["work_percent"] == 105])
        if len(same) < 6:
            continue
        rng = np.random.default_rng(0)
        rows: dict[str, Any] = {}
        for slowdown in SLOWDOWNS:
            runs = draw(same, RUNS, 12, rng) + math.log1p(slowdown)
            rows[f"{100 * slowdown:g}"] = judged(runs, draw(same, RUNS, CONTROL_PAIRS, rng))
        entry = {
            "num_pairs": len(same), "seconds_a_pair": _mean(of, "seconds"),
            "load_average_1min": _mean(of, "load_average_1min"),
            # By the median of absolute deviations: a burst of load is not what quads are like.
            "spread_of_a_quad_percent": _percent(
                1.4826 * np.median(np.abs(same - np.median(same)))
            ),
            "difference_percent": _percent(np.median(same, axis=1).mean()), "injected": rows,
        }  # fmt: skip
        if len(slower) >= 6:
            entry["slower_program"] = {
                "num_pairs": len(slower),
                "difference_percent": _percent(np.median(slower, axis=1).mean()),
                **judged(
                    draw(slower, RUNS, 12, rng), draw(same, RUNS, CONTROL_PAIRS, rng)
                ),
            }  # fmt: skip
        found[condition] = entry
    return found


def _mean(pairs: list[dict[str, Any]], key: str) -> float:
    return round(float(np.mean([pair[key] for pair in pairs])), 2)


def _percent(value: float) -> float:
    return round(100 * float(value), 3)


def answers(target: str) -> dict[str, int]:
    """Clips by whether baseline and artifact named their class, on the whole test set."""
    rows = json.loads(RESULTS.with_name("reference_models.json").read_text())
    (row,) = [row for row in rows if (row["model"], row["target"]) == ("penvideo20", target)]
    found = row["metrics"]
    right = round(found["baseline_top1_percent"] * found["num_clips"] / 100)
    lost, won = found["num_right_to_wrong"], found["num_wrong_to_right"]
    return {
        "num_clips": found["num_clips"], "both_right": right - lost, "right_to_wrong": lost,
        "wrong_to_right": won, "both_wrong": found["num_clips"] - right - won,
    }  # fmt: skip


def exchanged(cells: dict[str, int]) -> dict[str, int]:
    """The control: of clips with two answers, half have them exchanged, so that nothing is lost."""
    half, odd = divmod(cells["right_to_wrong"] + cells["wrong_to_right"], 2)
    return {
        **cells, "right_to_wrong": half, "wrong_to_right": half,
        "both_wrong": cells["both_wrong"] + odd,
    }  # fmt: skip


def gate_outcomes(cells: dict[str, int], drops: tuple[float, ...] = DROPS) -> dict[str, Any]:
    """Outcomes of the gate by bar and injected drop, on test sets drawn from these clips."""
    from vcompress.validate.gate import judge
    from vcompress.validate.paired import paired_drop

    names = ("both_right", "right_to_wrong", "wrong_to_right", "both_wrong")
    counts = np.array([cells[name] for name in names])
    num_clips = int(counts.sum())
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for drop in drops:
        rows = {bar: Counter[str]() for bar in BARS}
        established = 0
        # Right answers of the artifact that become wrong, at random.
        chance = drop / 100 * num_clips / (counts[0] + counts[2])
        for drawn in rng.multinomial(num_clips, counts / num_clips, RUNS):
            lost, unwon = rng.binomial(drawn[0], chance), rng.binomial(drawn[2], chance)
            to_wrong, to_right = int(drawn[1] + lost), int(drawn[2] - unwon)
            metrics = {
                "num_clips": num_clips, "num_disagreements": to_wrong + to_right,
                "num_right_to_wrong": to_wrong, "num_wrong_to_right": to_right,
            }  # fmt: skip
            for bar in BARS:
                rows[bar][judge(metrics, max_drop_points=bar).outcome] += 1
            bounds = paired_drop(
                num_clips=num_clips, num_right_to_wrong=to_wrong, num_wrong_to_right=to_right
            )
            established += bounds.lower_points > 0
        found[f"{drop:g}"] = {
            "runs": RUNS, "drop_established": established,
            **{f"bar_{bar:g}": dict(rows[bar]) for bar in BARS},
        }  # fmt: skip
    return found


def tables(results: dict[str, Any]) -> str:
    """What docs/validation.md shows, in Markdown; shares of 100 runs."""
    lines = ["| machine | pairs | spread of a quad | injected | regression | pass | inconclusive "
             "| mean seconds |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip

    def row(name: str, entry: dict[str, Any], words: str, found: dict[str, Any]) -> str:
        cells = [f"{100 * found[word] / found['runs']:.1f}" for word in
                 ("regression", "pass", "inconclusive")]  # fmt: skip
        return (
            f"| {name} | {entry['num_pairs']} | "
            f"{entry['spread_of_a_quad_percent']:.1f} % | {words} | "
            f"{' | '.join(cells)} | {found['mean_pairs'] * entry['seconds_a_pair']:.0f} |"
        )

    for name, entry in results.get("verdicts", {}).items():
        lines += [row(name, entry, f"{percent} %", found)
                  for percent, found in entry["injected"].items()]  # fmt: skip
        if "slower_program" in entry:
            found = entry["slower_program"]
            lines.append(row(name, {**entry, "num_pairs": found["num_pairs"]},
                             "none: 105 calls for 100", found))  # fmt: skip
    lines += [
        "",
        "| artifact | injected drop | drop established | bar 0.5: pass, fail, "
        "inconclusive | bar 1.0: pass, fail, inconclusive |",
        "|---|---|---|---|---|",
    ]
    for name, entry in results.get("accuracy", {}).items():
        for drop, found in entry["outcomes"].items():
            shares = [
                ", ".join(f"{100 * found[f'bar_{bar:g}'].get(word, 0) / found['runs']:.1f}"
                          for word in ("pass", "fail", "inconclusive"))
                for bar in BARS
            ]  # fmt: skip
            established = 100 * found["drop_established"] / found["runs"]
            lines.append(f"| {name} | {drop} pt | {established:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Record, or draw from what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command")
    recorder = commands.add_parser("record")
    recorder.add_argument("condition", choices=CONDITIONS)
    recorder.add_argument("--artifact", type=Path, required=True)
    recorder.add_argument("--seconds", type=float, default=170)
    recorder.add_argument("--program", action="store_true")
    commands.add_parser("accuracy")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(
            arguments.condition, arguments.artifact, arguments.seconds, arguments.results,
            program=arguments.program,
        )  # fmt: skip
    elif arguments.command == "accuracy":
        results = _read(arguments.results)
        results["accuracy"] = {
            f"penvideo20 {target}": {"answers": cells, "outcomes": gate_outcomes(cells)}
            for target in TARGETS
            for cells in [answers(target)]
        }
        for target in TARGETS:
            cells = exchanged(results["accuracy"][f"penvideo20 {target}"]["answers"])
            results["accuracy"][f"penvideo20 {target}, exchanged"] = {
                "answers": cells, "outcomes": gate_outcomes(cells, (0.0, 1.0)),
            }  # fmt: skip
        _write(arguments.results, results)
    else:
        results = _read(arguments.results)
        results["verdicts"] = verdicts(results.get("pairs", []))
        _write(arguments.results, results)
        print(tables(results))


if __name__ == "__main__":
    main()
