"""Clip search: the scale of each block with which its weighted rounding error is smallest.

What: the largest magnitude of a block need not be the largest that its scale can hold. For each
block (each channel, each tensor: whatever has a scale in the format) a few scales around the usual
one are tried, and the one with the least sum of importance * (w - rounded w)^2 is taken. Importance
of an input channel is the mean square of what arrives there, so that the sum is the error of the
output as far as channels are uncorrelated. The static range of an input is searched alike.
Source: clipping by squared error is common to OMSE (Kravchik et al., https://arxiv.org/abs/1902.01888)
and AWQ (Lin et al., https://arxiv.org/abs/2306.00978); scales above the usual one come from four
over six (Cook et al., https://arxiv.org/abs/2512.02010).
What we changed: one grid of ratios below and above 1 for every format; for NVFP4 it contains four
over six. Ratios are of the scale before it is rounded to what the format stores.

Shapes: N output channels, K contraction, B block, G = K / B, T tokens.
"""

from __future__ import annotations

import torch

from vcompress.compress.algorithms.rounding import GRIDS, Scales, block_amax, tensor_scale
from vcompress.compress.numerics import operands
from vcompress.compress.stored import CODECS

__all__ = ["search_blocks", "search_input_amax", "search_scales"]

# The usual scale comes first: of equal errors the first is taken. Elements of FP4 and FP8 repeat
# with every power of two, so that more than a factor of two would bring nothing but saturation.
_RATIOS = (1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 0.95, 0.9, 0.85, 0.8, 0.75)
_INTEGER_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7)
_POWER_OF_TWO_RATIOS = (1.0, 0.5)
_INPUT_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)


def _ratios(format: str) -> tuple[float, ...]:
    if format.startswith("mx"):
        return _POWER_OF_TWO_RATIOS
    return _INTEGER_RATIOS if format.startswith("int") else _RATIOS


def search_blocks(
    blocks: torch.Tensor, importance: torch.Tensor, format: str, tensor: torch.Tensor | None
) -> torch.Tensor:
    """Scales `[N, G]`, or `[1, 1]` for one scale a tensor, of `blocks` `[N, G, B]`.

    Args:
        importance: `[G, B]`, not negative.
        format: a key of `rounding.GRIDS`.
        tensor: the tensor scale, for a format that has one.
    """
    grid, amax = GRIDS[format], block_amax(blocks, format)
    usual = torch.where(amax == 0, torch.ones_like(amax), amax / grid.largest_code)
    best_scale = best_error = torch.empty(0)
    for ratio in _ratios(format):
        scale = grid.allowed_scale(usual * ratio, tensor)
        divisor = scale.unsqueeze(-1)
        error = grid.round_elements_(blocks / divisor).mul_(divisor).sub_(blocks)
        summed = torch.einsum("ngb,gb->ng", error.square_(), importance)
        if grid.block_size < 0:
            summed = summed.sum().view(1, 1)
        if ratio == 1.0:
            best_scale, best_error = scale, summed
        else:
            # A comparison with NaN is false: what overflowed is not taken.
            better = summed < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, summed, best_error)
    return best_scale


def search_scales(weight: torch.Tensor, importance: torch.Tensor, format: str) -> Scales:
    """Scales of `weight` `[N, K]` with the least error, weighted by `importance` `[K]`."""
    grid, tensor = GRIDS[format], tensor_scale(weight, format, headroom=True)
    blocks = grid.blocks(weight).contiguous()
    scales = search_blocks(blocks, importance.view(blocks.shape[1:]), format, tensor)
    return Scales(format=format, blocks=scales, tensor=tensor)


def search_input_amax(
    inputs: torch.Tensor, importance: torch.Tensor, format: str, input_amax: float
) -> float:
    """The range of a static input scale with the least rounding error; at most `input_amax`.

    Only for `fp8` and `int8`: the static scale of `nvfp4` does not clip below the largest value.

    Args:
        inputs: `[T, K]` tokens as they arrive at the rounding.
        importance: `[K]`, of an input channel: the sum of squares of its weights.
        format: formats whose input has no such scale give `input_amax` back.
        input_amax: largest magnitude in calibration.
    """
    codec = CODECS[format]
    if codec.input_scale is None or format == "nvfp4" or not len(inputs):
        return input_amax
    errors: dict[float, float] = {}
    for ratio in _INPUT_RATIOS:
        amax = min(ratio * input_amax, operands.LARGEST_VALUE)
        error = codec.round_input(inputs, codec.input_scale(amax)) - inputs
        errors[amax] = float((error.square_().mean(0) * importance).sum())
    return min(errors, key=lambda amax: errors[amax])
