"""The layer as its rounding sees it: weight and inputs smoothed, rotated, and freed of the branch.

Every algorithm works on this, whatever was done to the layer before. The statistics are those of
the centred inputs, as `bias` moves what the means contribute into the bias.

Shapes: T tokens, N output channels, K input channels, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from vcompress.compress.algorithms.problem import LayerProblem
from vcompress.compress.numerics import hadamard
from vcompress.compress.stored import CODECS

__all__ = ["Moments", "Working", "working_form"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean products over tokens of the centred inputs x and the centred rounded inputs xq.

    Attributes:
        rounded: `[K, K]`, of xq with xq: the Hessian of the output error by the weight, halved.
        lost: `[K, K]`, of x - xq with xq: what a weight on xq can make up for.
    """

    rounded: torch.Tensor
    lost: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Working:
    """A layer in front of its rounding.

    Attributes:
        problem: the layer as it is.
        weight: `[N, K]` float32, to be rounded.
        inputs: `[T, K]`, smoothed and rotated.
        input_amax: of those, over all of calibration (estimated from the sample).
        smoothed_amax: the same before the rotation.
        rotation: block size, or None.
        smoothing: `[K]`, or None.
        low_rank: `[R, K]` and `[N, R]`, or None.
    """

    problem: LayerProblem
    weight: torch.Tensor
    inputs: torch.Tensor
    input_amax: float
    smoothed_amax: float
    rotation: int | None
    smoothing: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None

    @cached_property
    def rounded(self) -> torch.Tensor:
        """`[T, K]`: the inputs as the format can hold them."""
        codec = CODECS[self.problem.format]
        scale = None if codec.input_scale is None else codec.input_scale(self.input_amax)
        return codec.round_input(self.inputs, scale)

    @cached_property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean input and mean rounded input, both `[K]`."""
        return self.inputs.mean(0), self.rounded.mean(0)

    @cached_property
    def folds(self) -> tuple[Moments, Moments]:
        """Moments of the first and of the second half of the tokens; both of all, if it is one."""
        mean, mean_rounded = self.means
        inputs, rounded = self.inputs - mean, self.rounded - mean_rounded
        half = len(inputs) // 2
        first = _moments(inputs[:half], rounded[:half])
        return first, _moments(inputs[half:], rounded[half:])

    @cached_property
    def moments(self) -> Moments:
        """Moments of all tokens."""
        first, second = self.folds
        share = (len(self.inputs) // 2) / max(1, len(self.inputs))
        return Moments(
            rounded=first.rounded.mul(share).add_(second.rounded, alpha=1 - share),
            lost=first.lost.mul(share).add_(second.lost, alpha=1 - share),
        )

    @cached_property
    def importance(self) -> torch.Tensor:
        """`[K]`: mean square of each rounded input channel; ones where there are no tokens."""
        if not len(self.inputs):
            return torch.ones(self.weight.shape[1])
        return self.rounded.square().mean(0)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What was done to the layer, as parts of `compress.tensors`."""
        parts: dict[str, torch.Tensor] = {}
        if self.smoothing is not None:
            parts["input_smoothing"] = self.smoothing
        if self.low_rank is not None:
            parts["low_rank_down"], parts["low_rank_up"] = self.low_rank
        return parts


def _moments(inputs: torch.Tensor, rounded: torch.Tensor) -> Moments:
    count = max(1, len(rounded))
    return Moments(
        rounded=rounded.t() @ rounded / count, lost=(inputs - rounded).t() @ rounded / count
    )


def working_form(
    problem: LayerProblem, *, rotation: int | None = None, smoothing: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Working:  # fmt: skip
    """`problem` with its input multiplied by `smoothing` `[K]`, then rotated; see `frozen`.

    Args:
        rotation: a power of two that divides K.
        smoothing: positive.
        low_rank: down `[R, K]` and up `[N, R]`, taken off the smoothed weight.
    """
    weight, inputs, largest = problem.weight, problem.inputs, problem.input_amax
    sample = float(inputs.abs().amax()) if len(inputs) else 0.0
    beyond = largest / sample if sample > 0 else 1.0
    if smoothing is not None:
        weight, inputs = weight / smoothing, inputs * smoothing
        if len(inputs):
            largest = float(inputs.abs().amax()) * beyond
    smoothed = largest
    if low_rank is not None:
        weight = weight - low_rank[1] @ low_rank[0]
    if rotation is not None:
        weight, inputs = hadamard.rotate(weight, rotation), hadamard.rotate(inputs, rotation)
        if len(inputs):
            largest = float(inputs.abs().amax()) * beyond
    return Working(
        problem=problem, weight=weight, inputs=inputs, input_amax=largest, smoothed_amax=smoothed,
        rotation=rotation, smoothing=smoothing, low_rank=low_rank,
    )  # fmt: skip
