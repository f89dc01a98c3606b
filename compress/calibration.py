"""Calibrate the weights and inputs of the chosen layers, and use only what helps.

A third of the calibration clips is held out. Every algorithm, ours or modelopt's, is fitted to the
others and judged layer by layer on tokens of clips that it was not fitted to; a layer for which it
is worse than plain rounding, or NaN, is rounded plainly. What comes of all layers together is
judged in `whole_model`. What was accepted is then fitted once more, to all clips: with a few dozen
clips the third that judged is worth as much as the answer gained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from vcompress.calib.calls import Samples
from vcompress.calib.samples import sample_inputs
from vcompress.compress.algorithms.problem import LayerProblem, Solution, split_tokens
from vcompress.compress.algorithms.recipes import Recipe
from vcompress.compress.algorithms.select import ALGORITHMS as OWN_ALGORITHMS
from vcompress.compress.algorithms.select import guarded, plain, recipes_of, solve
from vcompress.compress.clip_choice import fit_and_judge
from vcompress.compress.context import PlanContext
from vcompress.compress.frozen import freeze
from vcompress.compress.modelopt_bridge import ALGORITHMS as MODELOPT_ALGORITHMS
from vcompress.compress.modelopt_bridge import RANKS as MODELOPT_RANKS
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import nearest

__all__ = [
    "ALGORITHMS", "calibrate_layers", "check_algorithm", "extra_bits", "fit_to_all",
    "freeze_solutions",
]  # fmt: skip

ALGORITHMS: tuple[str, ...] = (*OWN_ALGORITHMS, *MODELOPT_ALGORITHMS)

_FEWEST_TOKENS, _MOST_TOKENS = 4096, 16384
_NUM_JUDGING_TOKENS = 2048
_SAMPLE_BYTES = 2**30
# With eight bits plain rounding loses next to nothing; what `auto` could gain is too little.
_FEW_BITS = 8
_FLOAT_BITS = 32
# Of a layer's stored weight; under a budget of bits, what costs more is not stored beside it.
_EXTRA_SHARE = 0.01


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
    num_tokens = _num_tokens(model, treated)
    inputs = _samples(model, list(treated), fitted, num_tokens, context)
    held_out: dict[str, torch.Tensor] = {}
    if judged is not None:
        held_out = _samples(model, list(treated), judged, _NUM_JUDGING_TOKENS, context)
    # Layers that all the clips together reach, but not those of the one part.
    missing = {name: each for name, each in held_out.items() if name not in inputs}
    inputs |= missing
    held_out = {name: each for name, each in held_out.items() if name not in missing}
    return solutions | _solved(model, treated, fitted, inputs, held_out, context)


def fit_to_all(
    model: VideoModel, formats: Mapping[str, str], solutions: Mapping[str, Solution],
    context: PlanContext,
) -> dict[str, Solution]:  # fmt: skip
    """`solutions`, which were judged on held-out clips, fitted to these as well.

    Nothing is left to judge the new ones by but the tokens that they were fitted to: one that is
    worse than plain rounding there gives way to its predecessor.
    """
    judged = fit_and_judge(context.calibration)[1]
    accepted = {
        name: formats[name] for name, each in solutions.items() if each.tensors or each.rotation
    }
    if judged is None or not accepted:
        return dict(solutions)
    inputs = _samples(
        model, list(accepted), context.calibration, _num_tokens(model, accepted), context
    )
    seen = {
        name: tokens[:: -(-len(tokens) // _NUM_JUDGING_TOKENS)] for name, tokens in inputs.items()
    }
    again = _solved(model, accepted, context.calibration, inputs, seen, context)
    return {
        name: replace(
            again[name], gain=first.gain,
            note=f"{first.note}; then fitted to all {len(context.calibration)} clips",
        )
        if name in again and (again[name].tensors or again[name].rotation)
        else first
        for name, first in solutions.items()
    }  # fmt: skip


def _solved(
    model: VideoModel, formats: Mapping[str, str], clips: Samples,
    inputs: Mapping[str, torch.Tensor], held_out: Mapping[str, torch.Tensor], context: PlanContext,
) -> dict[str, Solution]:  # fmt: skip
    """The answers of `context.algorithm`, fitted to `clips`, from which `inputs` are."""
    if context.algorithm in MODELOPT_ALGORITHMS:
        return _from_modelopt(model, formats, clips, inputs, held_out, context)
    solutions = {}
    with context.stage(f"calibrate ({context.algorithm})", len(formats)) as advance:
        for name, format_name in formats.items():
            problem = _problem(model, name, format_name, inputs, context)
            solutions[name] = solve(
                problem, context.algorithm, held_out=held_out.get(name), seed=context.seed,
                frugal=_is_frugal(model, name, format_name, context.budget),
            )  # fmt: skip
            advance(1)
    return solutions


def _num_tokens(model: VideoModel, names: Iterable[str]) -> int:
    """Tokens of each layer to fit to: as many as help, where all of them fit into memory."""
    width = sum(model.layers[name].weight_shape[1] for name in names)
    return min(_MOST_TOKENS, max(_FEWEST_TOKENS, _SAMPLE_BYTES // (_FLOAT_BITS // 8 * width)))


def check_algorithm(name: str) -> None:
    """Raise `InputError` unless `name` is one of `ALGORITHMS`."""
    if name not in ALGORITHMS:
        message = (
            f"unknown algorithm {name!r}{nearest(name, ALGORITHMS)}; choose one of: "
            f"{', '.join(ALGORITHMS)}"
        )
        raise InputError(message)


def _is_frugal(model: VideoModel, name: str, format_name: str, budget: Budget | None) -> bool:
    """Whether `auto` stores nothing beside the weight of the layer, since bits are short."""
    if budget is None or budget.kind not in ("effective_bits", "weight_bytes"):
        return False
    added = _added_bits(model, name, recipes_of("auto"))
    return added > _EXTRA_SHARE * FORMATS[format_name].weight_bits(model.layers[name].weight_shape)


def extra_bits(
    model: VideoModel, name: str, format_name: str, algorithm: str, budget: Budget | None = None
) -> int:
    """At most so many bits does `algorithm` add to the layer `name` beside its stored weight.

    Smoothing factors, a low-rank branch, and a bias where the layer has none.
    """
    if format_name == FLOAT or not _wanted(model, name, format_name, algorithm):
        return 0
    num_outputs, num_inputs = model.layers[name].weight_shape
    if algorithm in MODELOPT_ALGORITHMS:
        rank = MODELOPT_RANKS.get(algorithm, 0)
        return _FLOAT_BITS * (num_inputs + rank * (num_inputs + num_outputs))
    frugal = _is_frugal(model, name, format_name, budget)
    has_bias = model.layer(name).bias is not None
    return _added_bits(model, name, recipes_of(algorithm, frugal=frugal, has_bias=has_bias))


def _added_bits(model: VideoModel, name: str, recipes: tuple[Recipe, ...]) -> int:
    """What the costliest of `recipes` stores beside the weight of the linear layer `name`."""
    num_outputs, num_inputs = model.layers[name].weight_shape
    bias = num_outputs if model.layer(name).bias is None else 0
    return max(
        _FLOAT_BITS * (
            (num_inputs if recipe.smoothing else 0) + recipe.rank * (num_inputs + num_outputs)
            + (bias if recipe.bias else 0)
        )
        for recipe in recipes
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
    model: VideoModel, formats: Mapping[str, str], clips: Samples,
    inputs: Mapping[str, torch.Tensor], held_out: Mapping[str, torch.Tensor], context: PlanContext,
) -> dict[str, Solution]:  # fmt: skip
    from vcompress.compress.modelopt_bridge import calibrate

    def run_clips(subject: VideoModel) -> None:
        for batch in clips.tensors(8):
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
