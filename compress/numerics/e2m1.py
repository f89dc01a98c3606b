"""E2M1: the four-bit floating-point elements that NVFP4 and MXFP4 share.

What: one sign, two exponent and one mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
Source: OCP Microscaling Formats v1.0 and FLOAT4E2M1 of ONNX; rounds like
`ml_dtypes.float4_e2m1fn`, half to even, by arithmetic on the bits of float32 instead of a search.
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


def round_(scaled: torch.Tensor) -> torch.Tensor:
    """Round contiguous float32 values to E2M1 in place, saturating at 6; NaN stays NaN."""
    scaled.clamp_(-LARGEST_ELEMENT, LARGEST_ELEMENT)
    return round_mantissa_(scaled, num_bits=1, smallest_normal=1.0)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put pairs of four-bit `codes` (uint8 `[..., K]`, K even) into bytes `[..., K/2]`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: bytes `[..., K/2]` to four-bit codes, uint8 `[..., K]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode(scaled: torch.Tensor) -> torch.Tensor:
    """Four-bit codes, uint8, of finite float32 `scaled`, which is overwritten."""
    sign = (scaled < 0).to(torch.uint8) << 3
    # Twice an element is 0, 1, 2, 3, 4, 6, 8 or 12; the three terms give its code, 0 to 7.
    twice = round_(scaled).abs_().mul_(2).to(torch.uint8)
    codes = torch.minimum(torch.minimum(twice, (twice >> 1) + 2), (twice >> 2) + 4)
    return codes | sign


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The float32 elements `[..., K]` of bytes `[..., K/2]`."""
    values = torch.tensor(ELEMENT_VALUES, device=packed.device)
    # One look-up fetches both elements of a byte: two float32 seen as one int64.
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    both = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    return both.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])
