"""Calibrate the weights and inputs of the chosen layers, and use only what helps.

A third of the calibration clips is held out. Every algorithm, ours or modelopt's, is fitted to the
others and judged layer by layer on tokens of clips that it was not fitted to; a layer for which it
is worse than plain rounding, or NaN, is rounded plainly. What comes of all layers together is
judged in `whole_model`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vcompress.calib.calls import Samples
from vcompress.calib.samples import sample_inputs
from vcompress.compress.algorithms.problem import LayerProblem, Solution, split_tokens
from vcompress.compress.algorithms.select import ALGORITHMS as OWN_ALGORITHMS
from vcompress.compress.algorithms.select import guarded, plain, recipes_of, solve
from vcompress.compress.clip_choice import fit_and_judge
from vcompress.compress.context import PlanContext
from vcompress.compress.frozen import freeze
from vcompress.compress.modelopt_bridge import ALGORITHMS as MODELOPT_ALGORITHMS
from vcompress.compress.modelopt_bridge import RANKS as MODELOPT_RANKS
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import nearest

__all__ = [
    "ALGORITHMS", "calibrate_layers", "check_algorithm", "extra_bits", "freeze_solutions",
]  # fmt: skip

ALGORITHMS: tuple[str, ...] = (*OWN_ALGORITHMS, *MODELOPT_ALGORITHMS)

_NUM_TOKENS = 4096
# With eight bits plain rounding loses next to nothing; what `auto` could gain is too little.
_FEW_BITS = 8
_FLOAT_BITS = 32


def calibrate_layers(
    model: VideoModel, formats: Mapping[str, str], context: PlanContext
) -> dict[str, Solution]:
    """A solution for every layer of `formats` that is not kept and was reached.

    Raises:
        InputError: the algorithm is unknown.
    """
    check_algorithm(context.algorithm)
    amax = context.stats.input_amax
    chosen = {name: each for name, each in formats.items() if each != FLOAT and name in amax}
    solutions = {name: Solution(input_amax=amax[name], note="") for name in chosen}
    treated = {
        name: each for name, each in chosen.items() if _wanted(model, name, each, context.algorithm)
    }
    if context.algorithm == "max" or not treated:
        return solutions
    fitted, judged = fit_and_judge(context.calibration)
    if judged is None and context.algorithm == "auto":
        context.warn("auto needs a second calibration clip to judge by; layers are rounded plainly")
        return solutions
    inputs = _samples(model, list(treated), fitted, _NUM_TOKENS, context)
    held_out: dict[str, torch.Tensor] = {}
    if judged is not None:
        held_out = _samples(model, list(treated), judged, _NUM_TOKENS // 2, context)
    # Layers that all the clips together reach, but not those of the one part.
    missing = {name: each for name, each in held_out.items() if name not in inputs}
    inputs |= missing
    held_out = {name: each for name, each in held_out.items() if name not in missing}
    if context.algorithm in MODELOPT_ALGORITHMS:
        return solutions | _from_modelopt(model, treated, inputs, held_out, context)
    with context.stage(f"calibrate ({context.algorithm})", len(treated)) as advance:
        for name, format_name in treated.items():
            problem = _problem(model, name, format_name, inputs, context)
            solutions[name] = solve(
                problem, context.algorithm, held_out=held_out.get(name), seed=context.seed
            )
            advance(1)
    return solutions


def check_algorithm(name: str) -> None:
    """Raise `InputError` unless `name` is one of `ALGORITHMS`."""
    if name not in ALGORITHMS:
        message = (
            f"unknown algorithm {name!r}{nearest(name, ALGORITHMS)}; choose one of: "
            f"{', '.join(ALGORITHMS)}"
        )
        raise InputError(message)


def extra_bits(model: VideoModel, name: str, format_name: str, algorithm: str) -> int:
    """At most so many bits does `algorithm` add to the layer `name` beside its stored weight.

    Smoothing factors, a low-rank branch, and a bias where the layer has none.
    """
    if format_name == FLOAT or not _wanted(model, name, format_name, algorithm):
        return 0
    num_outputs, num_inputs = model.layers[name].weight_shape
    if algorithm in MODELOPT_ALGORITHMS:
        rank = MODELOPT_RANKS.get(algorithm, 0)
        return _FLOAT_BITS * (num_inputs + rank * (num_inputs + num_outputs))
    bias = num_outputs if model.layer(name).bias is None else 0
    return max(
        _FLOAT_BITS * (
            (num_inputs if recipe.smoothing else 0) + recipe.rank * (num_inputs + num_outputs)
            + (bias if recipe.bias else 0)
        )
        for recipe in recipes_of(algorithm)
    )  # fmt: skip


def _wanted(model: VideoModel, name: str, format_name: str, algorithm: str) -> bool:
    if model.layers[name].kind != "linear":
        return False
    return algorithm != "auto" or FORMATS[format_name].element_bits < _FEW_BITS


def _samples(
    model: VideoModel, names: list[str], clips: Samples, num_tokens: int, context: PlanContext
) -> dict[str, torch.Tensor]:
    with context.stage("sample inputs", len(clips)) as advance:
        return sample_inputs(
            model, {name: model.layer(name) for name in names}, clips,
            num_tokens=num_tokens, seed=context.seed, on_batch=advance,
        )  # fmt: skip


def _problem(
    model: VideoModel, name: str, format_name: str, inputs: Mapping[str, torch.Tensor],
    context: PlanContext,
) -> LayerProblem:  # fmt: skip
    layer = model.layer(name)
    assert isinstance(layer, nn.Linear)
    return LayerProblem(
        weight=layer.weight.detach().float(),
        bias=None if layer.bias is None else layer.bias.detach().float(),
        inputs=inputs[name],
        input_amax=context.stats.input_amax[name],
        format=format_name,
    )


def _from_modelopt(
    model: VideoModel, formats: Mapping[str, str], inputs: Mapping[str, torch.Tensor],
    held_out: Mapping[str, torch.Tensor], context: PlanContext,
) -> dict[str, Solution]:  # fmt: skip
    from vcompress.compress.modelopt_bridge import calibrate

    def run_clips(subject: VideoModel) -> None:
        for batch in fit_and_judge(context.calibration)[0].tensors(8):
            subject(batch)

    with context.stage(f"calibrate with modelopt ({context.algorithm})", None):
        found = calibrate(model, formats, context.algorithm, run_clips)
    if context.algorithm != "modelopt-max" and not found.tensors:
        context.warn(f"{context.algorithm} changed no layer of this model and target")
    solutions = {}
    for name, format_name in formats.items():
        problem = _problem(model, name, format_name, inputs, context)
        if name not in found.input_amax:
            solutions[name] = plain(problem, note=f"{context.algorithm} left this layer out")
            continue
        judged = held_out.get(name)
        if judged is None or not len(judged):
            _, judged = split_tokens(problem, context.seed)
        solutions[name] = guarded(problem, found.solution(name), judged)
    return solutions


def freeze_solutions(
    model: VideoModel, formats: Mapping[str, str], solutions: Mapping[str, Solution]
) -> dict[str, nn.Module]:
    """The layers of `solutions` in their format, as the plan will make them."""
    return {
        name: freeze(
            model.layer(name), formats[name],
            solution.input_amax if FORMATS[formats[name]].needs_input_amax else None,
            rotation=solution.rotation, tensors=solution.tensors, name=name,
        )
        for name, solution in solutions.items()
    }  # fmt: skip
