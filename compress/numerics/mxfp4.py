"""MXFP4: four-bit floating-point numbers with a power of two for every 32 of them, W4A4.

What: a value is `e2m1 * block_scale`. E2M1 elements hold up to 6; 32 neighbours along the
contraction share an E8M0 block scale, a power of two.
Source: OCP MX v1.0, element type MXFP4; elements round like `ml_dtypes.float4_e2m1fn`, half to
even. Scales are equal, bit for bit, to those of modelopt's `MXFP4QTensor`.
What we changed: modelopt rounds the ties .75, 1.75 and 3.5 toward zero, where the specification
and hardware round half to even, and gives positive zeros the code of negative ones; all other
elements are equal. Scales of zeros and of blocks whose amax is below 6 * 2^-100, see
`microscaling`. Where amax is a few units in the last place above 6 * 2^e, the scale is 2^(e + 1),
exact; modelopt's logarithm rounds it to 2^e, with which the same value saturates.
Outside the range: see `microscaling`.

Shapes: N output channels, K contraction, divisible by 32.

| stored | type | shape | bits a value |
|---|---|---|---|
| packed | uint8, the even index in the low four bits | [N, K/2] | 4 |
| block_scale | float8_e8m0fnu | [N, K/32] | 0.25 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import e2m1, microscaling, operands
from vcompress.compress.numerics.e2m1 import ELEMENT_VALUES, LARGEST_ELEMENT, pack, unpack
from vcompress.compress.numerics.microscaling import BLOCK_SIZE

__all__ = [
    "BLOCK_SIZE", "ELEMENT_VALUES", "LARGEST_ELEMENT", "Mxfp4Weight", "dequantize",
    "fake_quantize_weight", "pack", "quantize_dequantize", "quantize_weight", "unpack",
    "weight_bits",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mxfp4Weight:
    """A stored weight: `packed` uint8 `[N, K/2]`, `block_scale` float8_e8m0fnu `[N, K/32]`."""

    packed: torch.Tensor
    block_scale: torch.Tensor


def weight_bits(shape: tuple[int, int]) -> int:
    """Bits of a stored weight of `shape` `[N, K]`, scales counted: 4.25 a value."""
    return microscaling.weight_bits(shape, 4)


def quantize_weight(weight: torch.Tensor, *, name: str = "weight") -> Mxfp4Weight:
    """Quantize `weight` `[N, K]`, with K divisible by 32.

    Raises:
        InputError: see `operands.check_weight`; not two axes; K not divisible by 32.
    """
    weight = operands.check_matrix(weight, name, format="mxfp4", block_size=BLOCK_SIZE)
    blocks = weight.reshape(weight.shape[0], -1, BLOCK_SIZE)
    scale = microscaling.block_scale(blocks, LARGEST_ELEMENT)
    return Mxfp4Weight(
        packed=pack(e2m1.encode(blocks / scale).flatten(1)),
        block_scale=microscaling.encode_scale(scale.squeeze(-1)),
    )


@torch.library.custom_op("vcompress::mxfp4_quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor) -> torch.Tensor:
    """Round `x` to what MXFP4 can hold, with block scales from `x` itself; same shape and type.

    Args:
        x: `[..., K]`, K divisible by 32, any floating-point type; the arithmetic is float32.

    Raises:
        InputError: K is not divisible by 32.
    """
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "mxfp4", "the input")
    return microscaling.quantize_dequantize(x, LARGEST_ELEMENT, e2m1.round_)


@quantize_dequantize.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "mxfp4", "the input")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::mxfp4_dequantize", mutates_args=())
def dequantize(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """The float32 values `[N, K]` of a stored weight.

    The arguments are as in `Mxfp4Weight`; `block_scale` may be its bytes, uint8, as well.
    """
    blocks = e2m1.decode(packed).view(*block_scale.shape, BLOCK_SIZE)
    return blocks.mul_(microscaling.decode_scale(block_scale).unsqueeze(-1)).flatten(-2)


@dequantize.register_fake
def _(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[N, K]` after a round trip through MXFP4, in its own type."""
    stored = quantize_weight(weight)
    values: torch.Tensor = dequantize(stored.packed, stored.block_scale)
    return values.to(weight.dtype)
