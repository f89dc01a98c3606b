"""Which algorithm a layer gets: by name, or the best of a few; and never one that does harm.

What: an answer is judged by the error of the layer's output on tokens that were not used to find
it, against plain rounding on the same tokens. One that is worse, or not a number, is not used.
`auto` takes GPTQ behind one of a short list of rotations and smoothings, the one with which plain
rounding has the smallest error; GPTQ itself would rank them alike and takes most of the time. The
list is in the order of cost at run time, and a costlier answer must be better by a margin: a
rotation or smoothing that brings nothing is not paid for. Where bits are short, the list is one of
answers that store nothing beside the weight: of a small layer, factors cost more bits than they
are worth.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from vcompress.compress.algorithms.problem import (
    LayerProblem,
    Solution,
    output_error,
    split_tokens,
)
from vcompress.compress.algorithms.recipes import LARGEST, RECIPES, Recipe, cook, preparation
from vcompress.compress.algorithms.rotation import sizes
from vcompress.compress.algorithms.smoothing import MAX_SEARCH_TOKENS, plain_error
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = ["ALGORITHMS", "guarded", "plain", "recipes_of", "solve"]

ALGORITHMS = (*RECIPES, "auto")

_AUTO = (
    Recipe(rounding="gptq", bias=True, input_clip=True),
    Recipe(smoothing="balanced", rounding="gptq", bias=True, input_clip=True),
    Recipe(rotation=32, smoothing="balanced", rounding="gptq", bias=True, input_clip=True),
    Recipe(rotation=LARGEST, smoothing="balanced", rounding="gptq", bias=True, input_clip=True),
)
# Nothing of these is stored beside the weight; a rotation costs no bits.
_FRUGAL = (
    Recipe(rounding="gptq", bias=True, input_clip=True),
    Recipe(rotation=32, rounding="gptq", bias=True, input_clip=True),
    Recipe(rotation=LARGEST, rounding="gptq", bias=True, input_clip=True),
)
_MARGIN = 0.96  # of the squared error of a cheaper answer


@torch.no_grad()
def solve(
    problem: LayerProblem, algorithm: str = "auto", *, held_out: torch.Tensor | None = None,
    seed: int = 0, frugal: bool = False,
) -> Solution:  # fmt: skip
    """The answer of `algorithm` to `problem`, or plain rounding if that is better.

    The same arguments give the same answer.

    Args:
        algorithm: one of `ALGORITHMS`.
        held_out: tokens `[T, K]` that judge, of clips that `problem` has none of; without them a
            third of the tokens of `problem` is not fitted and judges.
        seed: which tokens are held out.
        frugal: `auto` stores nothing beside the weight, no factors and no bias where there is none.

    Raises:
        InputError: an unknown algorithm; see `LayerProblem`.
    """
    if algorithm not in ALGORITHMS:
        message = (
            f"unknown algorithm {algorithm!r}{nearest(algorithm, ALGORITHMS)}; choose one of: "
            f"{', '.join(ALGORITHMS)}"
        )
        raise InputError(message)
    if algorithm == "max":
        return plain(problem)
    if not len(problem.inputs):
        return plain(problem, note=f"{algorithm} needs calibration tokens, there are none")
    fit = problem
    if held_out is None or not len(held_out):
        fit, held_out = split_tokens(problem, seed)
    recipe = (
        _best_prepared(fit, recipes_of(algorithm, frugal=frugal, has_bias=problem.bias is not None))
        if algorithm == "auto"
        else RECIPES[algorithm]
    )
    return guarded(problem, _cooked(fit, recipe), held_out)


def recipes_of(
    algorithm: str, *, frugal: bool = False, has_bias: bool = True
) -> tuple[Recipe, ...]:
    """All that `algorithm`, one of `ALGORITHMS`, may do to a layer.

    Args:
        frugal: as in `solve`.
        has_bias: whether the layer has a bias; only `frugal` asks.
    """
    if algorithm != "auto":
        return (RECIPES[algorithm],)
    return tuple(replace(each, bias=has_bias) for each in _FRUGAL) if frugal else _AUTO


def plain(problem: LayerProblem, *, note: str = "rounding to nearest") -> Solution:
    """Rounding to nearest, with no calibrated tensors."""
    return Solution(input_amax=problem.input_amax, note=note)


@torch.no_grad()
def guarded(problem: LayerProblem, candidate: Solution, held_out: torch.Tensor) -> Solution:
    """`candidate`, or plain rounding if that has a smaller error on `held_out` `[T, K]`.

    The note of what comes back has both errors. A candidate whose tensors do not fit the layer, or
    hold NaN, counts as one whose error is not a number.
    """
    fallback = plain(problem)
    plain_error = output_error(problem, fallback, held_out)
    error = _error_or_nan(problem, candidate, held_out)
    if error <= plain_error:
        note = f"{candidate.note}: error {error:.3%} on held-out tokens, {plain_error:.3%} without"
        gain = plain_error / error if error > 0 else math.inf
        return replace(candidate, note=note, gain=gain)
    outcome = f"error {error:.3%}" if math.isfinite(error) else "no finite output"
    note = (
        f"{candidate.note} not used: {outcome} on held-out tokens, {plain_error:.3%} by rounding "
        "to nearest"
    )
    return plain(problem, note=note)


def _best_prepared(problem: LayerProblem, recipes: tuple[Recipe, ...]) -> Recipe:
    """The one of `recipes` whose rotation and smoothing leave the least to its rounding.

    They are compared with rounding to nearest, which takes a fraction of the time of GPTQ.
    """
    step = max(1, len(problem.inputs) // MAX_SEARCH_TOKENS)
    sample = problem.with_inputs(problem.inputs[::step])
    best, best_error = recipes[0], math.inf
    for recipe in _candidates(problem, recipes):
        error = _prepared_error(sample, recipe)
        if error < _MARGIN * best_error:
            best, best_error = recipe, error
    return best


def _prepared_error(sample: LayerProblem, recipe: Recipe) -> float:
    """Squared error with the rotation and smoothing of `recipe`; NaN where they fail."""
    ones = torch.ones(sample.num_channels)
    try:
        rotation, factors = preparation(sample, recipe)
        return plain_error(sample, rotation, ones if factors is None else factors)
    except (LinAlgError, InputError):
        return math.nan


def _candidates(problem: LayerProblem, recipes: tuple[Recipe, ...]) -> list[Recipe]:
    available = sizes(problem.num_channels)
    return [
        recipe
        for recipe in recipes
        # 32 is a second opinion only where something larger is tried as well.
        if not (recipe.rotation == 32 and (32 not in available or available[-1] == 32))
        and not (recipe.rotation == LARGEST and not available)
    ]


def _cooked(fit: LayerProblem, recipe: Recipe) -> Solution:
    """What `recipe` gives, or an answer with NaN where its arithmetic fails."""
    try:
        return cook(fit, recipe)
    except (LinAlgError, InputError) as error:
        unusable = {"bias": torch.full((len(fit.weight),), math.nan)}
        note = f"{recipe.describe(None)} ({str(error).splitlines()[0]})"
        return Solution(tensors=unusable, input_amax=fit.input_amax, note=note)


def _error_or_nan(problem: LayerProblem, candidate: Solution, held_out: torch.Tensor) -> float:
    try:
        return output_error(problem, candidate, held_out)
    except InputError:
        return math.nan
