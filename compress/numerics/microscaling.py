"""What the MX formats share: blocks of 32 values with a power of two as their scale.

What: 32 neighbours along the contraction share one E8M0 scale, an exponent of eight bits; there is
no tensor scale, and both weights and inputs take their scales from themselves.
Source: OCP Microscaling Formats (MX) Specification v1.0
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
What we changed: section 6.3 rounds the scale down, by which the largest value of a block can lose
up to an eighth (E4M3) or a quarter (E2M1). Here the scale is the smallest power of two with which
nothing saturates, as in modelopt and in NVIDIA's recipe for training
(https://arxiv.org/abs/2506.08027). Scales are at least 2^-100, as runtimes flush subnormal
numbers, and 1.0 for a block of zeros (modelopt: at least 2^-127, and that for zeros).
Outside the range: magnitudes above 2^126 saturate there, infinities too, as there is no calibrated
amax to saturate at; float16 cannot hold 2^126, so that an infinity stays one. NaN makes its whole
block NaN, as its scale is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vcompress.compress.numerics import operands

__all__ = [
    "BLOCK_SIZE", "block_scale", "decode_scale", "encode_scale", "quantize_dequantize",
    "weight_bits",
]  # fmt: skip

BLOCK_SIZE = 32
_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF
_EXPONENT_SHIFT = 23
# 256 Ki values are 1 MiB: all temporaries of a piece stay in the cache.
_PIECE = 2**18


def block_scale(blocks: torch.Tensor, largest_element: float) -> torch.Tensor:
    """Powers of two, float32 `[..., 1]`, that map `blocks` `[..., 32]` into the elements' range."""
    smallest, largest = torch.aminmax(blocks, dim=-1, keepdim=True)
    exact = operands.weight_scale(torch.maximum(largest, smallest.neg_()), largest_element)
    # A mantissa that is not zero carries into the exponent: the next power of two.
    bits = (exact.view(torch.int32) + _MANTISSA_BITS).bitwise_and_(_EXPONENT_BITS)
    return torch.where(exact.isnan(), exact, bits.view(torch.float32))


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """float8_e8m0fnu of float32 powers of two: their exponents, where NaN has all bits set."""
    return (scale.view(torch.int32) >> _EXPONENT_SHIFT).to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32 values of float8_e8m0fnu `scale`, or of its bytes, uint8."""
    return scale.view(torch.float8_e8m0fnu).float()


def quantize_dequantize(
    x: torch.Tensor,
    largest_element: float,
    round_elements_: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Round `x` `[..., K]`, K divisible by 32, block by block; same shape and type, contiguous.

    Args:
        x: any floating-point type; the arithmetic is float32.
        largest_element: largest magnitude of the element type.
        round_elements_: rounds contiguous float32 values to the element type in place.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    values, rounded = x.reshape(-1), result.view(-1)
    for start in range(0, values.numel(), _PIECE):
        blocks = values[start : start + _PIECE].view(-1, BLOCK_SIZE).float()
        blocks = blocks.clamp(-operands.LARGEST_VALUE, operands.LARGEST_VALUE)
        scale = block_scale(blocks, largest_element)
        elements = round_elements_(blocks / scale)
        torch.mul(elements, scale, out=rounded[start : start + _PIECE].view(-1, BLOCK_SIZE))
    return result


def weight_bits(shape: tuple[int, int], element_bits: int) -> int:
    """Bits of a stored weight of `shape` `[N, K]`: its elements, and eight for each block."""
    count = shape[0] * shape[1]
    return count * element_bits + count // BLOCK_SIZE * 8
