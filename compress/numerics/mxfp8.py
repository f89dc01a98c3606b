"""MXFP8: eight-bit floating-point numbers with a power of two for every 32 of them, W8A8.

What: a value is `e4m3 * block_scale`. E4M3 elements hold up to 448; 32 neighbours along the
contraction share an E8M0 block scale, a power of two.
Source: OCP MX v1.0, element type MXFP8 E4M3; elements round like `ml_dtypes.float8_e4m3fn`, half
to even. Stored weights are equal, bit for bit, to those of modelopt's `MXFP8QTensor`.
What we changed: scales of zeros and of blocks whose amax is below 448 * 2^-100, see `microscaling`.
Where amax is a few units in the last place above 448 * 2^e, the scale is 2^(e + 1), exact;
modelopt's logarithm rounds it to 2^e, with which the same value saturates.
Outside the range: see `microscaling`.

Shapes: N output channels, K contraction, divisible by 32.

| stored | type | shape | bits a value |
|---|---|---|---|
| codes | float8_e4m3fn | [N, K] | 8 |
| block_scale | float8_e8m0fnu | [N, K/32] | 0.25 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import microscaling, operands
from vcompress.compress.numerics.microscaling import BLOCK_SIZE
from vcompress.compress.numerics.rounding import round_mantissa_

__all__ = [
    "BLOCK_SIZE", "LARGEST_ELEMENT", "Mxfp8Weight", "dequantize", "fake_quantize_weight",
    "quantize_dequantize", "quantize_weight", "weight_bits",
]  # fmt: skip

LARGEST_ELEMENT = 448.0


@dataclass(frozen=True, kw_only=True)
class Mxfp8Weight:
    """A stored weight: `codes` float8_e4m3fn `[N, K]`, `block_scale` float8_e8m0fnu `[N, K/32]`."""

    codes: torch.Tensor
    block_scale: torch.Tensor


def _round_elements_(scaled: torch.Tensor) -> torch.Tensor:
    """Round float32 values to E4M3 in place, saturating at 448."""
    scaled.clamp_(-LARGEST_ELEMENT, LARGEST_ELEMENT)
    return round_mantissa_(scaled, num_bits=3, smallest_normal=2.0**-6)


def weight_bits(shape: tuple[int, int]) -> int:
    """Bits of a stored weight of `shape` `[N, K]`, scales counted: 8.25 a value."""
    return microscaling.weight_bits(shape, 8)


def quantize_weight(weight: torch.Tensor, *, name: str = "weight") -> Mxfp8Weight:
    """Quantize `weight` `[N, K]`, with K divisible by 32.

    Raises:
        InputError: see `operands.check_weight`; not two axes; K not divisible by 32.
    """
    weight = operands.check_matrix(weight, name, format="mxfp8", block_size=BLOCK_SIZE)
    blocks = weight.reshape(weight.shape[0], -1, BLOCK_SIZE)
    scale = microscaling.block_scale(blocks, LARGEST_ELEMENT)
    # Scales are rounded up, so nothing exceeds the range, which torch would turn into NaN.
    return Mxfp8Weight(
        codes=(blocks / scale).flatten(1).to(torch.float8_e4m3fn),
        block_scale=microscaling.encode_scale(scale.squeeze(-1)),
    )


@torch.library.custom_op("vcompress::mxfp8_quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor) -> torch.Tensor:
    """Round `x` to what MXFP8 can hold, with block scales from `x` itself; same shape and type.

    Args:
        x: `[..., K]`, K divisible by 32, any floating-point type; the arithmetic is float32.

    Raises:
        InputError: K is not divisible by 32.
    """
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "mxfp8", "the input")
    return microscaling.quantize_dequantize(x, LARGEST_ELEMENT, _round_elements_)


@quantize_dequantize.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "mxfp8", "the input")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::mxfp8_dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """The float32 values `[N, K]` of a stored weight.

    The arguments are as in `Mxfp8Weight`; `block_scale` may be its bytes, uint8, as well.
    """
    blocks = codes.float().view(*block_scale.shape, BLOCK_SIZE)
    return blocks.mul_(microscaling.decode_scale(block_scale).unsqueeze(-1)).flatten(-2)


@dequantize.register_fake
def _(codes: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[N, K]` after a round trip through MXFP8, in its own type."""
    stored = quantize_weight(weight)
    values: torch.Tensor = dequantize(stored.codes, stored.block_scale)
    return values.to(weight.dtype)
