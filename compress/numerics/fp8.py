"""FP8: E4M3 floating-point numbers, W8A8.

What: weight and input each have one float32 scale a tensor, amax / 448.
Source: Micikevicius et al., "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433); the
variant without infinities, float8_e4m3fn, as in ONNX QuantizeLinear with `saturate=1`.
Outside the range: values beyond the calibrated amax saturate, infinities too; NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import operands
from vcompress.compress.numerics.rounding import round_mantissa_

__all__ = [
    "LARGEST_CODE", "Fp8Weight", "dequantize", "fake_quantize_weight", "input_scale",
    "quantize_dequantize", "quantize_weight",
]  # fmt: skip

LARGEST_CODE = 448.0


@dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """A stored weight: `codes` float8_e4m3fn `[N, ...]`, `scale` float32, 0-dim."""

    codes: torch.Tensor
    scale: torch.Tensor


def quantize_weight(weight: torch.Tensor, *, name: str = "weight") -> Fp8Weight:
    """Quantize `weight` `[N, ...]` with one scale.

    Raises:
        InputError: see `operands.check_weight`.
    """
    weight = operands.check_weight(weight, name)
    scale = operands.weight_scale(weight.abs().amax(), LARGEST_CODE)
    # torch turns what exceeds the range into NaN; ONNX and the hardware saturate.
    codes = (weight / scale).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    return Fp8Weight(codes=codes, scale=scale)


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


@torch.library.custom_op("vcompress::fp8_dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of float8_e4m3fn `codes` with a 0-dim `scale`."""
    return codes.float().mul_(scale)


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[N, ...]` after a round trip through FP8, in its own type."""
    stored = quantize_weight(weight)
    values: torch.Tensor = dequantize(stored.codes, stored.scale)
    return values.to(weight.dtype)
