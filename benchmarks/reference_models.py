"""Accuracy, size and latency of the reference recognisers in every target, on full test sets.

    python benchmarks/reference_models.py [MODEL ...]

Each row is one run of `vcompress quantize reference:MODEL --target TARGET` with all test clips;
`benchmarks/results/reference_models.json` collects them and `--table` prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RESULTS = Path(__file__).parent / "results" / "reference_models.json"
MODELS = ("penvideo20", "moving-fashion")
TARGETS = ("nvfp4", "fp8", "int8")
ALL_TEST_CLIPS = 10_000


def measure(model: str, target: str) -> dict[str, Any]:
    """Quantize `model` for `target` and return what the report says."""
    import vcompress

    source = f"reference:{model}"
    with tempfile.TemporaryDirectory() as folder:
        outcome = vcompress.quantize(
            source,
            options=vcompress.Options(
                target=target, calib=source, output=Path(folder) / "out",
                num_test_clips=ALL_TEST_CLIPS,
                command=f"vcompress quantize {source} --target {target} --calib {source} "
                f"--num-test-clips {ALL_TEST_CLIPS}",
            ),
        )  # fmt: skip
        outputs = np.load(outcome.path / "proof.npz", allow_pickle=False)["baseline"]
    report = outcome.report
    stages = {stage["name"]: stage for stage in report["stages"]}
    result, onnx_baseline = stages["portable ONNX"], stages["baseline ONNX"]
    assert result["metrics"] is not None
    assert result["metrics_versus_previous"] is not None
    assert result["parity"] is not None
    return {
        "model": model,
        "target": target,
        "command": report["command"],
        "device": report["device"],
        "versions": report["versions"],
        "sizes": report["sizes"],
        "effective_bits": report["precision"]["result_effective_bits"],
        "metrics": result["metrics"],
        "baseline_confusions": confusions(model, outputs),
        "agreement_with_planned_torch_percent": result["metrics_versus_previous"][
            "agreement_percent"
        ],
        "parity": result["parity"],
        "agreement": result.get("agreement"),
        "latency": result["latency"],
        "baseline_latency": onnx_baseline["latency"],
        "verdict": report["verdict"],
        "engines": report["engines"],
    }


def confusions(model: str, outputs: npt.NDArray[np.float32]) -> list[str]:
    """The ten most frequent mistakes of the uncompressed model: "label -> guess: clips"."""
    from vcompress.models.reference.catalog import REFERENCE_MODELS, reference_clips

    names = REFERENCE_MODELS[model].labels
    labels = reference_clips(model, "test")[1]
    assert len(labels) == len(outputs)
    guesses = outputs.argmax(-1)
    wrong = Counter(
        (int(label), int(guess))
        for label, guess in zip(labels, guesses, strict=True)
        if label != guess
    )
    return [
        f"{names[label]} -> {names[guess]}: {count}"
        for (label, guess), count in wrong.most_common(10)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The README's table in Markdown."""
    lines = [
        "| model (test clips) | target | weights MiB | effective bits | top-1 % | drop, points "
        "(95 % upper bound) | gate 1 pt | CPU speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        metrics, latency = row["metrics"], row["latency"]
        sizes = row["sizes"]
        speed = "simulated"
        if latency is not None:
            ratio = latency["speed"]
            speed = (
                f"{ratio['speed_ratio']:.2f}x [{ratio['speed_ratio_lower']:.2f}, "
                f"{ratio['speed_ratio_upper']:.2f}]"
            )
        lines.append(
            f"| {row['model']} ({metrics['num_clips']:,}) | {row['target']} | "
            f"{sizes['baseline_weights_mib']:.2f} -> {sizes['result_weights_mib']:.2f} | "
            f"{row['effective_bits']:.2f} | "
            f"{metrics['baseline_top1_percent']:.2f} -> {metrics['top1_percent']:.2f} | "
            f"{metrics['top1_drop_points']:.2f} ({row['verdict']['drop_points_upper']:.2f}) | "
            f"{row['verdict']['outcome']} | {speed} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, keep the other rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=[])
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if not arguments.table:
        for model in arguments.models or list(MODELS):
            for target in TARGETS:
                row = measure(model, target)
                rows = [r for r in rows if (r["model"], r["target"]) != (model, target)] + [row]
                rows.sort(key=lambda r: (MODELS.index(r["model"]), TARGETS.index(r["target"])))
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
