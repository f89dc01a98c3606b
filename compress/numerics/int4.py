"""INT4: symmetric four-bit integers with a scale for every group of them, weights only (W4A16).

What: a value is `code * scale` with codes from -8 to 7; 32, 64 or 128 neighbours along the
contraction share a float16 scale, amax / 7. The input stays as it is.
Source: ONNX QuantizeLinear with `block_size` and the INT4 type, whose bytes `packed` has.
What we changed: codes are those of modelopt's `INT4QTensor` where its scale, 7 / amax in the type
of the weight, is exact in float16; it stores `code + 8`, the even index in the high four bits, and
makes a group of zeros NaN, which has scale 1.0 here.
Outside the range: a scale must be a float16, hence at most 65504 (else `InputError`) and at least
2^-24; below 2^-14 it has fewer bits, and values saturate or are lost, never wrong by more than
themselves.

Shapes: N output channels, K contraction, G group size, a divisor of K.

| stored | type | shape | bits a value |
|---|---|---|---|
| packed | uint8, the even index in the low four bits | [N, K/2] | 4 |
| scale | float16 | [N, K/G] | 0.5, 0.25 or 0.125 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import operands
from vcompress.spec.errors import InputError

__all__ = [
    "GROUP_SIZES", "LARGEST_CODE", "Int4Weight", "dequantize", "fake_quantize_weight", "pack",
    "quantize_weight", "unpack", "weight_bits",
]  # fmt: skip

GROUP_SIZES = (32, 64, 128)
LARGEST_CODE = 7.0
_SMALLEST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """A stored weight `[N, K]`: `packed` uint8 `[N, K/2]`, `scale` float16 `[N, K/G]`."""

    packed: torch.Tensor
    scale: torch.Tensor


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        message = f"group_size of int4 must be one of {GROUP_SIZES}, got {group_size}; use 128"
        raise InputError(message)


def _group_scale(groups: torch.Tensor, name: str) -> torch.Tensor:
    """float16 scales `[N, K/G, 1]` of float32 `groups` `[N, K/G, G]`."""
    amax = groups.abs().amax(-1, keepdim=True)
    largest = amax.max().item() / LARGEST_CODE
    if largest > _LARGEST_SCALE:
        message = (
            f"{name} must have magnitudes of at most 7 * 65504 for int4, whose scales are float16; "
            f"got {amax.max().item()}; choose another format for the layer"
        )
        raise InputError(message)
    scale = (amax / LARGEST_CODE).clamp_(min=_SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale).half()


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put pairs of `codes` (int8 `[..., K]`, K even, -8 to 7) into bytes, uint8 `[..., K/2]`."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: bytes `[..., K/2]` to codes, int8 `[..., K]`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    # Moves bit 3 to bit 7 and back, which copies it to the bits between: two's complement.
    return (nibbles << 4) >> 4


def weight_bits(shape: tuple[int, int], *, group_size: int = 128) -> int:
    """Bits of a stored weight of `shape` `[N, K]`, scales counted: `4 + 16 / group_size` a value.

    Raises:
        InputError: a `group_size` that is not in `GROUP_SIZES`.
    """
    _check_group_size(group_size)
    count = shape[0] * shape[1]
    return count * 4 + count // group_size * 16


def quantize_weight(
    weight: torch.Tensor, *, group_size: int = 128, name: str = "weight"
) -> Int4Weight:
    """Quantize `weight` `[N, K]`, with K divisible by `group_size`.

    Args:
        weight: any floating-point type; the arithmetic is float32.
        group_size: 32, 64 or 128. Smaller groups are more accurate and cost more bits.
        name: what the error calls the weight.

    Raises:
        InputError: see `operands.check_weight`; not two axes; K not divisible by `group_size`; a
            magnitude above 7 * 65504; another `group_size`.
    """
    _check_group_size(group_size)
    weight = operands.check_matrix(weight, name, format="int4", block_size=group_size)
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scale = _group_scale(groups, name)
    codes = (groups / scale.float()).round_().clamp_(-8, 7).to(torch.int8)
    return Int4Weight(packed=pack(codes.flatten(1)), scale=scale.squeeze(-1))


@torch.library.custom_op("vcompress::int4_dequantize", mutates_args=())
def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values `[N, K]` of a stored weight; arguments as in `Int4Weight`."""
    groups = unpack(packed).float().view(*scale.shape, -1)
    return groups.mul_(scale.float().unsqueeze(-1)).flatten(-2)


@dequantize.register_fake
def _(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor, *, group_size: int = 128) -> torch.Tensor:
    """`weight` `[N, K]` after a round trip through INT4, in its own type."""
    stored = quantize_weight(weight, group_size=group_size)
    values: torch.Tensor = dequantize(stored.packed, stored.scale)
    return values.to(weight.dtype)
