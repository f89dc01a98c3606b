"""E2M1: the four-bit floating-point elements that NVFP4 and MXFP4 share.

What: one sign, two exponent and one mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
Source: OCP Microscaling Formats v1.0 and FLOAT4E2M1 of ONNX; rounds like
`ml_dtypes.float4_e2m1fn`, half to even, by arithmetic on the bits of float32 instead of a search.
What we changed: a negative zero has the code of a positive one, as in modelopt's `NVFP4QTensor`;
what is rounded to zero keeps its sign.
"""

from __future__ import annotations

import torch

from vcompress.compress.numerics.rounding import round_mantissa_

__all__ = ["ELEMENT_VALUES", "LARGEST_ELEMENT", "decode", "encode", "pack", "round_", "unpack"]

# Indexed by the four bits of an element.
ELEMENT_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
LARGEST_ELEMENT = 6.0
_EXPONENT_BITS = 0x7F800000
_EXPONENT_OF_ONE = 127 << 23
# 2^22 and six half steps of 1.
_ROUNDER = 2.0**22 + 3.0


def round_(scaled: torch.Tensor) -> torch.Tensor:
    """Round contiguous float32 values to E2M1 in place, saturating at 6; NaN stays NaN."""
    scaled.clamp_(-LARGEST_ELEMENT, LARGEST_ELEMENT)
    return round_mantissa_(scaled, num_bits=1, smallest_normal=1.0)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put pairs of four-bit `codes` (uint8 `[..., K]`, K even) into bytes `[..., K/2]`."""
    # A copy is aligned, and two codes of it are one int16, the first in its lower byte.
    pairs = codes.clone(memory_format=torch.contiguous_format).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: bytes `[..., K/2]` to four-bit codes, uint8 `[..., K]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode(scaled: torch.Tensor) -> torch.Tensor:
    """Four-bit codes, uint8, of finite contiguous float32 `scaled`, which is overwritten."""
    # Adding zero makes negative zeros positive.
    signs = scaled.add_(0.0).view(torch.int32) >> 28
    magnitude = scaled.abs_().clamp_(max=LARGEST_ELEMENT)
    steps = magnitude.view(torch.int32).bitwise_and(_EXPONENT_BITS).clamp_(min=_EXPONENT_OF_ONE)
    # As in `rounding`, with 2^e the power of two at or below a magnitude, 1 or above: the sum is
    # 2^(e + 22) and lower bits that count half steps, 2^(e - 1). A code is that count and 2 e.
    sums = magnitude.add_(steps.view(torch.float32).mul_(_ROUNDER)).view(torch.int32)
    # Bits from 22 on are 2 (e + 22 + 127), which is 2 e + 2 modulo 8; the rounder adds the 6.
    codes = torch.add(sums, sums >> 22, out=sums).bitwise_and_(7)
    return codes.bitwise_or_(signs.bitwise_and_(8)).to(torch.uint8)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The float32 elements `[..., K]` of bytes `[..., K/2]`."""
    values = torch.tensor(ELEMENT_VALUES, device=packed.device)
    # One look-up fetches both elements of a byte: two float32 seen as one int64.
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    both = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    return both.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])
