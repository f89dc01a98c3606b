"""Tokens: what reduction costs and saves, against constant schedules and simple controls.

    python benchmarks/tokens.py [SECTION ...] [--models MODEL ...] [--threads N]

`quality`: top-1 of the trained recognisers on their full test sets, technique by technique and for
the searched schedule, at several shares of the operations. `joint`: reduction and precision
together and apart. `clock`: wall-clock time against operations on VideoMAE-B geometry, in ONNX
Runtime and OpenVINO, interleaved, and what the matching costs.
`benchmarks/results/tokens.json` keeps the last run of each section and model; `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vcompress
from vcompress.benchmarks import tokens_clock, tokens_joint, tokens_quality
from vcompress.validate.latency import describe_device

RESULTS = Path(__file__).parent / "results" / "tokens.json"
MODELS = ("penvideo20", "moving-fashion")
GEOMETRY = "videomae-b-geometry"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": tokens_quality.table,
    "joint": tokens_joint.table,
    "clock": tokens_clock.table,
}
_PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "nvidia-modelopt")
Results = dict[str, dict[str, Any]]


def measure(section: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `section` on `model`, and say with what."""
    words = f"{section} --threads {arguments.threads} --seed {arguments.seed}"
    if section == "clock":
        result = tokens_clock.measure(threads=arguments.threads, rounds=arguments.rounds)
        words += f" --rounds {arguments.rounds}"
    else:
        run = tokens_quality.measure if section == "quality" else tokens_joint.measure
        result = run(model, seed=arguments.seed)
        words += f" --models {model}"
    return {
        "command": f"python benchmarks/tokens.py {words}",
        "device": describe_device(arguments.threads),
        "versions": {"vcompress": vcompress.__version__, **_versions()},
        **result,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read() -> Results:
    """What was measured before; empty sections where there is nothing."""
    stored: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {section: stored.get(section, {}) for section in TABLES}


def main() -> None:
    """Measure what was asked for, keep the rest, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*TABLES, []], default=[])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10, help="of `clock`")
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = read()
    for section in () if arguments.table else arguments.sections or list(TABLES):
        for model in [GEOMETRY] if section == "clock" else arguments.models:
            entry = measure(section, model, arguments)
            results = read()
            results[section][model] = entry
            RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            print(f"{TABLES[section]({model: entry})}\n", flush=True)
    if arguments.table:
        print("\n\n".join(TABLES[name](part) for name, part in results.items() if part))


if __name__ == "__main__":
    main()
