"""Recipes: how the algorithms are composed for one layer, by name.

A recipe says what is done to the layer before its weight is rounded, how it is rounded, and whether
its bias is corrected; `cook` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vcompress.compress.algorithms import rotation as rotations
from vcompress.compress.algorithms.bias import corrected_bias
from vcompress.compress.algorithms.clipping import search_input_amax, search_scales
from vcompress.compress.algorithms.gptq import gptq
from vcompress.compress.algorithms.low_rank import low_rank_branch, with_fitted_branch
from vcompress.compress.algorithms.problem import LayerProblem, Solution
from vcompress.compress.algorithms.rounding import (
    Scales,
    four_over_six_scales,
    largest_scales,
    pack_weight,
    round_weight,
)
from vcompress.compress.algorithms.smoothing import RULES
from vcompress.compress.algorithms.working import Working, working_form

__all__ = ["LARGEST", "RECIPES", "Recipe", "cook", "preparation"]

LARGEST = -1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One composition.

    Attributes:
        rotation: block size of the online rotation, None, or LARGEST for the largest that divides
            the layer's input channels. A layer that the size does not divide is not rotated.
        smoothing: a key of `smoothing.RULES`, or None.
        rounding: of the weight: "nearest", "four-over-six" (nvfp4; else as "mse"), "mse" (clip
            search) or "gptq".
        rank: of a low-rank branch; 0 for none.
        bias: correct the bias.
        input_clip: search the range of a static input, where it clips.
    """

    rotation: int | None = None
    smoothing: str | None = None
    rounding: str = "nearest"
    rank: int = 0
    bias: bool = False
    input_clip: bool = False

    def describe(self, rotation: int | None) -> str:
        """A few words for people, with the block size that was taken."""
        words = [
            "" if rotation is None else f"hadamard {rotation}",
            "" if self.smoothing is None else f"{self.smoothing} smoothing",
            f"low rank {self.rank}" if self.rank else "",
            "" if self.rounding == "nearest" else self.rounding,
            "bias correction" if self.bias else "",
        ]
        return " + ".join(word for word in words if word) or "rounding to nearest"


RECIPES: Mapping[str, Recipe] = {
    "max": Recipe(),
    "mse": Recipe(rounding="mse", input_clip=True),
    "four-over-six": Recipe(rounding="four-over-six"),
    "bias": Recipe(bias=True),
    "smooth": Recipe(smoothing="smoothquant"),
    "awq-like": Recipe(smoothing="awq"),
    "balanced": Recipe(smoothing="balanced"),
    "hadamard": Recipe(rotation=LARGEST),
    "hadamard+balanced": Recipe(rotation=LARGEST, smoothing="balanced"),
    "gptq": Recipe(rounding="gptq", bias=True, input_clip=True),
    "balanced+gptq": Recipe(smoothing="balanced", rounding="gptq", bias=True, input_clip=True),
    "hadamard+gptq": Recipe(rotation=LARGEST, rounding="gptq", bias=True, input_clip=True),
    "hadamard+balanced+gptq": Recipe(
        rotation=LARGEST, smoothing="balanced", rounding="gptq", bias=True, input_clip=True
    ),
    "svd": Recipe(smoothing="balanced", rank=32, rounding="mse", bias=True),
    "svd+gptq": Recipe(smoothing="balanced", rank=32, rounding="gptq", bias=True, input_clip=True),
    "svd16+gptq": Recipe(
        smoothing="balanced", rank=16, rounding="gptq", bias=True, input_clip=True
    ),
    "hadamard+svd+gptq": Recipe(
        rotation=LARGEST, smoothing="balanced", rank=32, rounding="gptq", bias=True,
        input_clip=True,
    ),
}  # fmt: skip


def cook(problem: LayerProblem, recipe: Recipe) -> Solution:
    """Carry out `recipe` with the tokens of `problem`."""
    rotation, smoothing = preparation(problem, recipe)
    branch = low_rank_branch(problem, smoothing, rank=recipe.rank) if recipe.rank else None
    working = working_form(problem, rotation=rotation, smoothing=smoothing, low_rank=branch)
    if recipe.input_clip:
        amax = search_input_amax(
            working.inputs, working.weight.square().sum(0), problem.format, working.input_amax
        )
        working = replace(working, input_amax=amax)
    values, scales = _rounded(working, recipe.rounding)
    if branch is not None and len(problem.inputs):
        working = with_fitted_branch(working, values)
    tensors = dict(working.tensors())
    # The branch was fitted to this rounding of the weight, which is a part of the answer then.
    if recipe.rounding != "nearest" or branch is not None:
        tensors |= pack_weight(values, scales)
    if recipe.bias and len(problem.inputs):
        tensors["bias"] = corrected_bias(working, values)
    return Solution(
        rotation=rotation, tensors=tensors, input_amax=working.input_amax,
        note=recipe.describe(rotation),
        smoothed_amax=None
        if rotation is None or smoothing is None
        else working.smoothed_amax,
    )  # fmt: skip


def preparation(problem: LayerProblem, recipe: Recipe) -> tuple[int | None, torch.Tensor | None]:
    """The block size of the rotation and the smoothing factors `[K]` that `recipe` asks for."""
    rotation = _rotation(recipe, problem.num_channels)
    if recipe.smoothing is None:
        return rotation, None
    return rotation, RULES[recipe.smoothing](problem, rotation)


def _rotation(recipe: Recipe, num_channels: int) -> int | None:
    if recipe.rotation == LARGEST:
        return rotations.largest_size(num_channels)
    return recipe.rotation if recipe.rotation in rotations.sizes(num_channels) else None


def _rounded(working: Working, rounding: str) -> tuple[torch.Tensor, Scales]:
    weight, format = working.weight, working.problem.format
    if rounding == "gptq" and len(working.inputs):
        return gptq(working)
    if rounding == "nearest":
        scales = largest_scales(weight, format)
    elif rounding == "four-over-six" and format == "nvfp4":
        scales = four_over_six_scales(weight)
    else:
        scales = search_scales(weight, working.importance, format)
    return round_weight(weight, scales), scales
