"""Section `predictor` of `benchmarks/precision.py`: predicted sensitivities against brute force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vcompress.benchmarks.precision_judge import finite, warm_up
from vcompress.benchmarks.zoo import BenchModel
from vcompress.compress.sensitivities import NUM_PROBES
from vcompress.pipeline.run import Silent
from vcompress.pipeline.sensitivity import measure_sensitivity

__all__ = ["measure", "table"]

FORMATS = ("nvfp4", "mxfp8", "fp8", "int8")


def measure(bench: BenchModel, *, seed: int) -> dict[str, Any]:
    """Predict the loss of every layer in every format, measure the same, compare.

    Brute force takes all calibration clips, the prediction as few as it does in the product; the
    seconds of the prediction include those of freezing all candidates, which both need.
    """
    warm_up()
    found = measure_sensitivity(
        bench.model, bench.calibration, FORMATS, check=True, seed=seed, progress=Silent()
    )
    assert found.measured is not None
    assert found.agreement is not None
    seconds = {name: round(value, 3) for name, value in found.seconds.items()}
    return {
        "loss": found.loss,
        "num_clips": {**found.num_clips, "brute_force": found.num_clips["calibration"]},
        "num_probes": NUM_PROBES,
        "agreement": _rounded(asdict(found.agreement)),
        "seconds": seconds,
        "predict_percent_of_brute_force": finite(100 * seconds["predict"] / seconds["brute_force"]),
        "kinds": dict(found.kinds),
        "unreached": list(found.unreached),
        "losses_predicted_measured": {
            layer: {
                name: [finite(value), finite(found.measured[layer][name])]
                for name, value in formats.items()
            }
            for layer, formats in found.predicted.items()
        },
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _rounded(value)
        if isinstance(value, Mapping)
        else finite(value)
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a model, in Markdown."""
    lines = [
        "| model | pairs | Spearman | "
        + " | ".join(FORMATS)
        + " | top fifth | regret % (at bits) | calibrate s | predict s (clips) | "
        "brute force s (clips) | predict / brute force % |",
        "|---" * (len(FORMATS) + 9) + "|",
    ]
    for name, entry in entries.items():
        agreement, seconds, clips = entry["agreement"], entry["seconds"], entry["num_clips"]
        by_format = " | ".join(
            _number(agreement["spearman_by_format"].get(each), "-") for each in FORMATS
        )
        lines.append(
            f"| {name} | {agreement['num_pairs']} | {_number(agreement['spearman'], 'nan')} | "
            f"{by_format} | {agreement['top_overlap']:.0%} | {100 * agreement['regret']:.1f} "
            f"({agreement['regret_bits']:g}) | {seconds['calibrate']:.1f} | "
            f"{seconds['predict']:.1f} ({clips['prediction']}) | {seconds['brute_force']:.1f} "
            f"({clips['brute_force']}) | {entry['predict_percent_of_brute_force']:.1f} |"
        )
    return "\n".join(lines)


def _number(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.3f}"
