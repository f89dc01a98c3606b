"""Smoothing: factors for input channels, which move difficulty between an input and its weight.

What: the input is multiplied by a factor for each channel, the weight divided by it. Three rules:

- `smoothquant`: s = max|w|^(1-a) / max|x|^a (Xiao et al., 2022, https://arxiv.org/abs/2211.10438);
- `awq`: s = mean|x|^-a, by which the weights of strong channels grow within their block before they
  are rounded (Lin et al., 2023, https://arxiv.org/abs/2306.00978);
- `balanced`: s = sqrt(rms w / rms x), without search or parameter. Where the error of an input is
  spread evenly over a block, as after a Hadamard rotation, the error of the output goes with
  sum(s^2 rms(x)^2) * sum(rms(w)^2 / s^2), sums over the block's channels. By Cauchy and Schwarz
  that is smallest here; for the error of the weight it is the same product.

What we changed: the exponent a is searched per layer by the error of the output, with rounded
weight and rounded input both, also for AWQ, which looks at the weight alone. The statistics have a
floor, so that a channel that was never used gets no extreme factor.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vcompress.compress.algorithms.problem import LayerProblem
from vcompress.compress.algorithms.rounding import largest_scales, round_weight
from vcompress.compress.algorithms.working import working_form

__all__ = ["MAX_SEARCH_TOKENS", "RULES", "awq", "balanced", "plain_error", "smoothquant"]

_FLOOR = 1e-3  # of the mean over channels
_EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_SEARCH_TOKENS = 512


def _floored(statistic: torch.Tensor) -> torch.Tensor:
    mean = float(statistic.mean())
    return statistic.clamp(min=_FLOOR * mean) if mean > 0 else torch.ones_like(statistic)


def _centred(factors: torch.Tensor) -> torch.Tensor:
    """`factors` divided by their geometric mean, which changes nothing but keeps ranges."""
    logarithms = factors.log()
    # Beyond this a factor would only trade one format's underflow for the other's.
    return (logarithms - logarithms.mean()).clamp_(-7.0, 7.0).exp()


def balanced(problem: LayerProblem, _rotation: int | None = None) -> torch.Tensor:
    """`[K]`: the closed form; ones where there is nothing to balance."""
    if not len(problem.inputs):
        return torch.ones(problem.num_channels)
    inputs = _floored(problem.inputs.square().mean(0).sqrt())
    weights = _floored(problem.weight.square().mean(0).sqrt())
    return _centred((weights / inputs).sqrt())


def smoothquant(problem: LayerProblem, rotation: int | None = None) -> torch.Tensor:
    """`[K]`: SmoothQuant's factors with the best of nine exponents, or ones if none helps."""
    if not len(problem.inputs):
        return torch.ones(problem.num_channels)
    inputs = _floored(problem.inputs.abs().amax(0))
    weights = _floored(problem.weight.abs().amax(0))
    return _search(
        problem, rotation, lambda exponent: weights.pow(1 - exponent) / inputs.pow(exponent)
    )


def awq(problem: LayerProblem, rotation: int | None = None) -> torch.Tensor:
    """`[K]`: AWQ's factors with the best of nine exponents, or ones if none helps."""
    if not len(problem.inputs):
        return torch.ones(problem.num_channels)
    inputs = _floored(problem.inputs.abs().mean(0))
    return _search(problem, rotation, lambda exponent: inputs.pow(-exponent))


def _search(
    problem: LayerProblem, rotation: int | None, rule: Callable[[float], torch.Tensor]
) -> torch.Tensor:
    step = max(1, len(problem.inputs) // MAX_SEARCH_TOKENS)
    sample = problem.with_inputs(problem.inputs[::step])
    best = torch.ones(problem.num_channels)
    best_error = plain_error(sample, rotation, best)
    for exponent in _EXPONENTS:
        factors = _centred(rule(exponent))
        error = plain_error(sample, rotation, factors)
        if error < best_error:
            best, best_error = factors, error
    return best


def plain_error(problem: LayerProblem, rotation: int | None, factors: torch.Tensor) -> float:
    """Squared error of the output with `factors` `[K]`, weight and input rounded to nearest."""
    working = working_form(problem, rotation=rotation, smoothing=factors)
    values = round_weight(working.weight, largest_scales(working.weight, problem.format))
    error = working.inputs @ working.weight.t() - working.rounded @ values.t()
    return float(error.square_().sum())


RULES: dict[str, Callable[[LayerProblem, int | None], torch.Tensor]] = {
    "smoothquant": smoothquant,
    "awq": awq,
    "balanced": balanced,
}
