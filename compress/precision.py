"""The precision of every layer: formats, then calibration, then a line of the plan each.

Without a budget a layer gets the first format of the target that its shape allows and that it can
bear (`quantize.choose`), judged with the calibrated layer. Under a budget the formats of all layers
are searched together (`mixed`), judged with plainly rounded layers, and calibrated afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vcompress.compress.algorithms.problem import Solution
from vcompress.compress.block_error import measure_block_errors
from vcompress.compress.calibration import calibrate_layers, fit_to_all, freeze_solutions
from vcompress.compress.context import PlanContext
from vcompress.compress.mixed import find_formats
from vcompress.compress.quantize import candidate_formats, choose
from vcompress.compress.tensors import WEIGHT_PREFIX, ModelTensors, words
from vcompress.compress.whole_model import without_harm
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.plan import LayerChoice

__all__ = ["PrecisionPlan", "plan_precision"]


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """The section `quantize` and what goes with it.

    Attributes:
        choices: by layer, in model order.
        tensors: calibrated, of the layers whose choices name them.
        evidence: what the decisions rest on.
    """

    choices: Mapping[str, LayerChoice]
    tensors: ModelTensors
    evidence: Mapping[str, object]


def plan_precision(model: VideoModel, context: PlanContext) -> PrecisionPlan:
    """Decide the precision of every layer of `model`.

    Raises:
        InputError: the budget cannot be met, or the algorithm is unknown.
    """
    if context.budget is None:
        return _in_order(model, context)
    return _searched(model, context)


def _in_order(model: VideoModel, context: PlanContext) -> PrecisionPlan:
    formats = candidate_formats(model, context.target)
    solutions, compared = without_harm(
        model, formats, calibrate_layers(model, formats, context), context
    )
    solutions = fit_to_all(model, formats, solutions, context)
    frozen = freeze_solutions(model, formats, solutions)
    with context.stage("block errors", len(frozen)) as advance:
        # Blocks are run alone, in the original model: merged tokens would not fit.
        scores = measure_block_errors(context.original, frozen, context.clips, advance)
    choices = choose(
        model, context.target, input_amax=context.stats.input_amax, scores=scores,
        max_layer_error=context.max_layer_error,
    )  # fmt: skip
    # A layer that fell back to another format is rounded plainly into it.
    used = {name: one for name, one in solutions.items() if choices[name].format == formats[name]}
    return _made(choices, used, {} if compared is None else {"calibration": compared})


def _searched(model: VideoModel, context: PlanContext) -> PrecisionPlan:
    found = find_formats(model, context)
    solutions, compared = without_harm(
        model, found.formats, calibrate_layers(model, found.formats, context), context
    )
    solutions = fit_to_all(model, found.formats, solutions, context)
    choices = {
        name: LayerChoice(
            format=found.formats[name], reason=found.reasons[name],
            input_amax=context.stats.input_amax[name], score=found.scores[name],
        )
        if name in found.formats
        else LayerChoice(format=FLOAT, reason="no calibration clip reached this layer")
        for name in model.layers
    }  # fmt: skip
    bits = _effective_bits(model, found.formats, solutions)
    search = {**found.evidence, "effective_bits": round(bits, 4)}
    evidence = {"search": search, **({} if compared is None else {"calibration": compared})}
    return _made(choices, solutions, evidence)


def _effective_bits(
    model: VideoModel, formats: Mapping[str, str], solutions: Mapping[str, Solution]
) -> float:
    """Bits a weight over the layers of `formats`, with all that calibration added to them."""
    bits, count = 0, 0
    for name, format_name in formats.items():
        weight, bias = model.layer(name).weight, model.layer(name).bias
        assert isinstance(weight, torch.Tensor)
        count += weight.numel()
        if format_name == FLOAT:
            bits += 8 * weight.numel() * weight.element_size()
            continue
        added = [
            tensor
            for part, tensor in solutions[name].tensors.items()
            if not part.startswith(WEIGHT_PREFIX) and not (part == "bias" and bias is not None)
        ]
        bits += FORMATS[format_name].weight_bits(tuple(weight.shape))
        bits += sum(8 * tensor.numel() * tensor.element_size() for tensor in added)
    return bits / max(1, count)


def _made(
    choices: Mapping[str, LayerChoice], solutions: Mapping[str, Solution],
    evidence: Mapping[str, object],
) -> PrecisionPlan:  # fmt: skip
    """Put `solutions` into the lines of their layers."""
    lines, tensors = dict(choices), {}
    for name, solution in solutions.items():
        if solution.note:
            lines[name] = replace(
                _with_range(lines[name], solution),
                rotation=solution.rotation,
                tensors=words(solution.tensors),
                reason=f"{lines[name].reason}; {solution.note}",
            )
        if solution.tensors:
            tensors[name] = solution.tensors
    return PrecisionPlan(choices=lines, tensors=tensors, evidence=evidence)


def _with_range(line: LayerChoice, solution: Solution) -> LayerChoice:
    """`line` with the ranges of `solution`; that of the input as it arrives stays where it can.

    Those who edit the line find the range for what they leave of it.
    """
    if solution.rotation is not None:
        return replace(line, rotated_amax=solution.input_amax, smoothed_amax=solution.smoothed_amax)
    if "input_smoothing" in solution.tensors:
        return replace(line, smoothed_amax=solution.input_amax)
    return replace(line, input_amax=solution.input_amax)
