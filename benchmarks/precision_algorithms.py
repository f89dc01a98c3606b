"""Section `algorithms` of `benchmarks/precision.py`: how W4A4 NVFP4 layers are calibrated.

The formats are those of `--target nvfp4`: NVFP4 for every linear layer whose shape allows it, INT8
where it does not, else the layer is kept; no layer falls back because of its error. Each algorithm
runs as in the product: layer by layer, plain rounding is taken where it is better on held-out
tokens (`by_layer`), then for all layers if the model as a whole is better off on calibration clips,
and what is left is fitted to all of these (`by_model`). modelopt's algorithms are shown as modelopt
leaves them (`unguarded`), fitted to all calibration clips. A model without NVFP4 layers has the row
"max" alone. Rows are kept as they come: those of a further run with other algorithms, and the same
clips, join them. The row "int8" is for those with a low-rank branch: plain INT8 in all layers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vcompress.benchmarks.precision_judge import Judge, finite
from vcompress.benchmarks.zoo import BenchModel
from vcompress.calib.observe import observe
from vcompress.compress import modelopt_bridge
from vcompress.compress.algorithms.problem import Solution
from vcompress.compress.block_error import replaced_all
from vcompress.compress.calibration import calibrate_layers, fit_to_all, freeze_solutions
from vcompress.compress.context import PlanContext
from vcompress.compress.frozen import FrozenLayer
from vcompress.compress.quantize import candidate_formats
from vcompress.compress.whole_model import without_harm
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Silent
from vcompress.spec.defaults import MAX_LAYER_ERROR
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.target import find_target

__all__ = ["ALGORITHMS", "measure", "table"]

ALGORITHMS = (
    "max", "modelopt-mse", "smoothquant", "awq", "modelopt-gptq", "svdquant", "hadamard", "gptq",
    "auto", "svd+gptq", "hadamard+svd+gptq", "int8",
)  # fmt: skip
_TARGET = "nvfp4"
_BATCH_SIZE = 8
# The words of `algorithms.select.guarded` for a layer that is rounded plainly after all.
_REJECTED = " not used: "


def measure(
    bench: BenchModel, *, algorithms: Sequence[str], seed: int,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row for each of `algorithms`, on the test clips of `bench`.

    Args:
        on_row: told everything so far after each row.
    """
    model = bench.model
    judge = Judge(bench)
    layers = {name: model.layer(name) for name in model.layers}
    stats = observe(model, layers, bench.calibration, needs=frozenset({"input_amax"}))
    formats = {
        name: each if name in stats.input_amax else FLOAT
        for name, each in candidate_formats(model, find_target(_TARGET)).items()
    }
    rows: dict[str, Any] = {}
    facts = {**judge.facts(), "num_layers": dict(Counter(formats.values())), "rows": rows}
    for algorithm in algorithms if _TARGET in formats.values() else ("max",):
        warnings: list[str] = []
        context = PlanContext(
            target=find_target(_TARGET), stats=stats, original=model,
            calibration=bench.calibration, tokens=None, algorithm=algorithm,
            max_layer_error=MAX_LAYER_ERROR, budget=None, seed=seed, stage=Silent().stage,
            warn=warnings.append,
        )  # fmt: skip
        if algorithm == "int8":
            rows[algorithm] = _in_int8(model, context, judge)
        elif algorithm in modelopt_bridge.ALGORITHMS:
            rows[algorithm] = _unguarded(model, formats, context, judge)
        else:
            rows[algorithm] = {**_row(model, formats, context, judge), "warnings": warnings}
        if on_row is not None:
            on_row(facts)
    return facts


def _row(
    model: VideoModel, formats: Mapping[str, str], context: PlanContext, judge: Judge
) -> dict[str, Any]:
    """What the product does with `context.algorithm`, before and after its last look."""
    start = time.perf_counter()
    by_layer = calibrate_layers(model, formats, context)
    calibrated = time.perf_counter()
    by_model, compared = without_harm(model, formats, by_layer, context)
    compared_at = time.perf_counter()
    made = fit_to_all(model, formats, by_model, context)
    fitted = time.perf_counter()
    notes = [solution.note for solution in by_layer.values()]
    return {
        "by_layer": _judged(model, formats, by_layer, judge),
        "by_model": _judged(model, formats, made, judge),
        "num_layers_changed": sum(
            bool(each.tensors or each.rotation) for each in by_layer.values()
        ),
        "num_layers_rejected": sum(_REJECTED in note for note in notes),
        "compared": compared,
        "seconds": {
            "calibrate": round(calibrated - start, 3),
            "compare": round(compared_at - calibrated, 3),
            "fit_to_all": round(fitted - compared_at, 3),
        },
    }  # fmt: skip


def _in_int8(model: VideoModel, context: PlanContext, judge: Judge) -> dict[str, Any]:
    """Plain rounding to INT8 in place of NVFP4."""
    amax = context.stats.input_amax
    formats = {
        name: each if name in amax else FLOAT
        for name, each in candidate_formats(model, find_target("int8")).items()
    }
    solutions = {
        name: Solution(input_amax=amax[name], note="")
        for name, each in formats.items()
        if each != FLOAT
    }
    return {
        "by_model": _judged(model, formats, solutions, judge),
        "num_layers_changed": 0, "num_layers_rejected": 0, "seconds": {"calibrate": 0.0},
    }  # fmt: skip


def _unguarded(
    model: VideoModel, formats: Mapping[str, str], context: PlanContext, judge: Judge
) -> dict[str, Any]:
    """What modelopt's algorithm gives, whether it helps or not."""

    def run_clips(subject: VideoModel) -> None:
        for batch in context.calibration.tensors(_BATCH_SIZE):
            subject(batch)

    amax = context.stats.input_amax
    # The product leaves convolutions to plain rounding.
    treated = {
        name: each
        for name, each in formats.items()
        if each != FLOAT and model.layers[name].kind == "linear"
    }
    start = time.perf_counter()
    found = modelopt_bridge.calibrate(model, treated, context.algorithm, run_clips)
    seconds = time.perf_counter() - start
    solutions = {
        name: found.solution(name)
        if name in found.input_amax
        else Solution(input_amax=amax[name], note="")
        for name, each in formats.items()
        if each != FLOAT
    }
    broken = {
        name for name, each in solutions.items() if not _can_freeze(model, formats, name, each)
    }
    # Such a layer has no frozen form at all; the others show what is left of the model.
    usable = {
        name: replace(each, tensors={}, input_amax=amax[name]) if name in broken else each
        for name, each in solutions.items()
    }
    return {
        "unguarded": _judged(model, formats, usable, judge),
        "num_layers_changed": sum(bool(each.tensors) for each in solutions.values()),
        "num_layers_not_finite": len(broken),
        "seconds": {"calibrate": round(seconds, 3)},
    }


def _can_freeze(
    model: VideoModel, formats: Mapping[str, str], name: str, solution: Solution
) -> bool:
    try:
        freeze_solutions(model, formats, {name: solution})
    except InputError:
        return False
    return True


def _judged(
    model: VideoModel, formats: Mapping[str, str], solutions: Mapping[str, Solution], judge: Judge
) -> dict[str, Any]:
    """Test metrics and effective bits of the model with `solutions`."""
    frozen = freeze_solutions(model, formats, solutions)
    with replaced_all(model.module, frozen):
        facts: dict[str, Any] = judge.judge(model)
    stored = [layer for layer in frozen.values() if isinstance(layer, FrozenLayer)]
    kept = [model.layer(name).weight for name in model.layers if name not in frozen]
    bits = sum(layer.weight_bits for layer in stored)
    bits += sum(8 * w.numel() * w.element_size() for w in kept if isinstance(w, torch.Tensor))
    extra = sum(layer.extra_bits for layer in stored)
    num_weights = sum(torch.Size(each.weight_shape).numel() for each in model.layers.values())
    return {
        **facts,
        "effective_bits": finite((bits + extra) / num_weights),
        "effective_bits_of_extras": finite(extra / num_weights),
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each model and algorithm, in Markdown."""
    lines = [
        "| model | algorithm | SQNR dB | metric | loss | effective bits (extras) | layers changed, "
        "rejected or broken | layer by layer alone: SQNR dB, metric | s |",
        "|---" * 9 + "|",
    ]
    for name, entry in entries.items():
        baseline = f"{entry['metric']} {_number(entry['baseline_metric'])}"
        lines.append(f"| {name} | uncompressed | | {baseline} |" + " |" * 5)
        for algorithm, row in entry["rows"].items():
            facts = row.get("unguarded") or row["by_model"]
            alone = row.get("by_layer", facts)
            not_used = row.get("num_layers_rejected", row.get("num_layers_not_finite"))
            lines.append(
                f"| {name} | {algorithm} | {_number(facts['sqnr_db'])} | "
                f"{_number(facts['metric'])} | {_number(facts['loss'], '.3g')} | "
                f"{facts['effective_bits']:.3f} ({facts['effective_bits_of_extras']:.3f}) | "
                f"{row['num_layers_changed']}, {not_used} | "
                f"{'the same' if alone == facts else _pair(alone)} | "
                f"{row['seconds']['calibrate']:.1f} |"
            )
    return "\n".join(lines)


def _pair(facts: Mapping[str, Any]) -> str:
    return f"{_number(facts['sqnr_db'])}, {_number(facts['metric'])}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "not finite" if value is None else format(value, form)
