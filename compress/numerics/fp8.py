"""FP8: E4M3 floating-point numbers, W8A8.

What: weight and input each have one float32 scale a tensor, amax / 448; a weight can have one an
output channel instead, and an input a dynamic one a token, from the token itself.
Source: Micikevicius et al., "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433); the
variant without infinities, float8_e4m3fn, as in ONNX QuantizeLinear with `saturate=1`.
Outside the range: values beyond the calibrated amax saturate, infinities too; NaN stays NaN. With
dynamic scales magnitudes above 2^126 saturate there, infinities too (float16 cannot hold 2^126, so
that an infinity stays one), and NaN makes its whole token NaN.

Shapes: N output channels, K channels of a token; the contraction is of any size.

| stored | type | shape | bits a value |
|---|---|---|---|
| codes | float8_e4m3fn | [N, ...] | 8 |
| scale | float32 | [], or [N] per channel | 32 / numel, or 32 N / numel |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vcompress.compress.numerics import operands
from vcompress.compress.numerics.rounding import round_mantissa_

__all__ = [
    "LARGEST_CODE", "Fp8Weight", "dequantize", "fake_quantize_weight", "input_scale",
    "quantize_dequantize", "quantize_dequantize_per_token", "quantize_weight", "weight_bits",
]  # fmt: skip

LARGEST_CODE = 448.0


@dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """A stored weight: `codes` float8_e4m3fn `[N, ...]`, `scale` float32, 0-dim or `[N]`."""

    codes: torch.Tensor
    scale: torch.Tensor


def _broadcast(scale: torch.Tensor, num_axes: int) -> torch.Tensor:
    """View scales `[N]` along the first of `num_axes` axes; pass a 0-dim one."""
    return scale if scale.ndim == 0 else scale.view(-1, *[1] * (num_axes - 1))


def weight_bits(shape: tuple[int, ...], *, per_channel: bool = False) -> int:
    """Bits of a stored weight of `shape` `[N, ...]`, scales counted."""
    return math.prod(shape) * 8 + (shape[0] if per_channel else 1) * 32


def quantize_weight(
    weight: torch.Tensor, *, per_channel: bool = False, name: str = "weight"
) -> Fp8Weight:
    """Quantize `weight` `[N, ...]` with one scale, or with one for each of its N output channels.

    Raises:
        InputError: see `operands.check_weight`.
    """
    weight = operands.check_weight(weight, name)
    magnitude = weight.abs()
    amax = magnitude.flatten(1).amax(1) if per_channel else magnitude.amax()
    scale = operands.weight_scale(amax, LARGEST_CODE)
    # torch turns what exceeds the range into NaN; ONNX and the hardware saturate.
    scaled = (weight / _broadcast(scale, weight.ndim)).clamp_(-LARGEST_CODE, LARGEST_CODE)
    return Fp8Weight(codes=scaled.to(torch.float8_e4m3fn), scale=scale)


def input_scale(amax: float) -> torch.Tensor:
    """Static scale of an input whose largest calibrated magnitude is `amax`, 0-dim float32."""
    return operands.input_scale(amax, LARGEST_CODE)


@torch.library.custom_op("vcompress::fp8_quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x` to what FP8 can hold; same shape and type.

    Args:
        x: any shape, any floating-point type; the arithmetic is float32.
        scale: 0-dim float32.
    """
    scaled = (x.float() / scale).clamp_(-LARGEST_CODE, LARGEST_CODE)
    rounded = round_mantissa_(scaled, num_bits=3, smallest_normal=2.0**-6)
    return rounded.mul_(scale).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vcompress::fp8_quantize_dequantize_per_token", mutates_args=())
def quantize_dequantize_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round each token of `x` to what FP8 can hold with a scale of its own, amax / 448.

    Args:
        x: `[..., K]`, K any size, any floating-point type; the arithmetic is float32. The result
            has its shape and type and is contiguous.
    """
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    values = x.float().clamp(-operands.LARGEST_VALUE, operands.LARGEST_VALUE).contiguous()
    scale = operands.weight_scale(values.abs().amax(-1, keepdim=True), LARGEST_CODE)
    # The division can round up to the next number above the range.
    scaled = values.div_(scale).clamp_(-LARGEST_CODE, LARGEST_CODE)
    rounded = round_mantissa_(scaled, num_bits=3, smallest_normal=2.0**-6)
    return rounded.mul_(scale).to(x.dtype)


@quantize_dequantize_per_token.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::fp8_dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of float8_e4m3fn `codes` `[N, ...]`; `scale` is 0-dim or `[N]`."""
    return codes.float().mul_(_broadcast(scale, codes.ndim))


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor, *, per_channel: bool = False) -> torch.Tensor:
    """`weight` `[N, ...]` after a round trip through FP8, in its own type."""
    stored = quantize_weight(weight, per_channel=per_channel)
    values: torch.Tensor = dequantize(stored.codes, stored.scale)
    return values.to(weight.dtype)
