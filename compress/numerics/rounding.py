"""Rounding float32 to fewer mantissa bits, half to even, with float32 additions alone.

What: adding 1.5 * 2^23 steps to a number leaves no room for bits below one step, so that the
addition itself rounds, by the rule of IEEE 754; subtracting them again is exact. The step follows
from the number's exponent. Vectorised on every CPU, unlike a search in a table or a cast to an
eight-bit type.
Source: `rint` of Sun's fdlibm, which adds 2^52 to a double; here the step is chosen per element.
"""

from __future__ import annotations

import math

import torch

__all__ = ["round_mantissa_"]

_EXPONENT_BITS = 0x7F800000
_EXPONENT_SHIFT = 23
_EXPONENT_BIAS = 127


def round_mantissa_(values: torch.Tensor, *, num_bits: int, smallest_normal: float) -> torch.Tensor:
    """Round `values` to `num_bits` mantissa bits in place and return them; NaN stays NaN.

    Args:
        values: contiguous float32 of magnitude at most 2^100.
        num_bits: mantissa bits that remain, without the leading one.
        smallest_normal: a power of two; below it the step no longer shrinks.
    """
    exponent = math.frexp(smallest_normal)[1] - 1
    lowest = (exponent + _EXPONENT_BIAS) << _EXPONENT_SHIFT
    power_bits = values.view(torch.int32).bitwise_and(_EXPONENT_BITS).clamp_(min=lowest)
    steps = power_bits.view(torch.float32).mul_(1.5 * 2.0 ** (_EXPONENT_SHIFT - num_bits))
    return values.add_(steps).sub_(steps)
