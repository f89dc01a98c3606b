"""Tokens: what reduction costs and saves, against constant schedules and simple controls.

    python benchmarks/tokens.py [SECTION ...] [--models MODEL ...] [--threads N]

`quality`: top-1 of the trained recognisers, technique by technique and for the searched schedule,
at several shares of the operations; stored rows of the same clips are kept. `joint`: reduction and
precision together and apart. `clock`: wall-clock time against operations on VideoMAE-B geometry, in
ONNX Runtime and OpenVINO, interleaved. `matching`: what one matching costs beside one block.
`benchmarks/results/tokens.json` keeps the last run of each section and model; `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vcompress
from vcompress.benchmarks import tokens_clock, tokens_joint, tokens_matching, tokens_quality
from vcompress.compress.tokens.decide import NUM_SEARCH_CLIPS
from vcompress.spec.token_section import ATTENTIONS
from vcompress.validate.latency import describe_device

RESULTS = Path(__file__).parent / "results" / "tokens.json"
MODELS = ("penvideo20", "moving-fashion")
GEOMETRY = "videomae-b-geometry"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": tokens_quality.table,
    "joint": tokens_joint.table,
    "clock": tokens_clock.table,
    "matching": tokens_matching.table,
}
_PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "nvidia-modelopt")
Results = dict[str, dict[str, Any]]


def measure(
    section: str, model: str, arguments: argparse.Namespace, known: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Run `section` on `model`, and say with what; `quality` after each row.

    Args:
        section: of `TABLES`.
        model: of `MODELS`.
        arguments: of the command line.
        known: what is stored of it.
    """
    words = f"{section} --threads {arguments.threads} --seed {arguments.seed}"
    results: Iterable[dict[str, Any]]
    if section == "clock":
        results = [
            tokens_clock.measure(
                threads=arguments.threads, rounds=arguments.rounds, attentions=arguments.attentions
            )
        ]
        words += f" --rounds {arguments.rounds} --attentions {' '.join(arguments.attentions)}"
    elif section == "matching":
        results = [tokens_matching.measure(rounds=arguments.rounds)]
        words += f" --rounds {arguments.rounds}"
    elif section == "joint":
        stored = read()["quality"].get(model)
        results = [
            tokens_joint.measure(model, stored, seed=arguments.seed, num_test=arguments.num_test)
        ]
        words += f" --models {model} --num-test {arguments.num_test}"
    else:
        scope = tokens_quality.Scope(
            shares=tuple(arguments.shares), num_search=arguments.num_search,
            schedules=tuple(arguments.schedules) if arguments.schedules else None,
            num_test=arguments.num_test,
            num_refit=arguments.num_refit, max_moves=arguments.max_moves,
            goes_on=arguments.go_on, seed=arguments.seed,
        )  # fmt: skip
        results = tokens_quality.measure(model, scope, known)
        words += (
            f" --models {model} --num-search {arguments.num_search} --num-test {arguments.num_test}"
        )
    for result in results:
        yield {
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
    parser.add_argument("--shares", type=float, nargs="+", default=list(tokens_quality.SHARES))
    parser.add_argument("--schedules", nargs="+", help="of `quality`; the others are kept")
    parser.add_argument("--num-search", type=int, default=NUM_SEARCH_CLIPS, help="of `quality`")
    parser.add_argument("--num-test", type=int, default=tokens_quality.NUM_TEST, help="likewise")
    parser.add_argument("--num-refit", type=int, default=tokens_quality.NUM_CALIBRATION)
    parser.add_argument("--max-moves", type=int, default=50, help="of the search in `quality`")
    parser.add_argument("--go-on", action="store_true", help="search from what is stored")
    parser.add_argument("--rounds", type=int, default=10, help="of `clock` and `matching`")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = read()
    for section in () if arguments.table else arguments.sections or list(TABLES):
        for model in [GEOMETRY] if section in {"clock", "matching"} else arguments.models:
            for entry in measure(section, model, arguments, results[section].get(model, {})):
                results = read()
                results[section][model] = entry
                RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            print(f"{TABLES[section]({model: results[section][model]})}\n", flush=True)
    if arguments.table:
        print("\n\n".join(TABLES[name](part) for name, part in results.items() if part))


if __name__ == "__main__":
    main()
