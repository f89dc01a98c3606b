"""INT8: symmetric eight-bit integers, W8A8.

What: a weight has one float32 scale an output channel, amax / 127; an input has one static scale
a tensor, or a dynamic one a token, from the token itself. Zero points are zero, which every
runtime accepts.
Source: ONNX QuantizeLinear and DequantizeLinear (https://onnx.ai/onnx/operators/), whose arithmetic
is followed to the letter: divide by the scale, round half to even, saturate to [-128, 127].
Outside the range: values beyond the calibrated amax saturate, infinities too. NaN stays NaN in the
fake quantization, so that a broken activation is seen; integers of a runtime cannot carry it. With
dynamic scales magnitudes above 2^126 saturate there, infinities too (float16 cannot hold 2^126, so
that an infinity stays one), and NaN makes its whole token NaN.

Shapes: N output channels, K channels of a token; the contraction is of any size.

| stored | type | shape | bits a value |
|---|---|---|---|
| codes | int8 | [N, ...] | 8 |
| scale | float32 | [N] | 32 N / numel |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vcompress.compress.numerics import operands

__all__ = [
    "LARGEST_CODE", "Int8Weight", "dequantize", "fake_quantize_weight", "input_scale",
    "quantize_dequantize", "quantize_dequantize_per_token", "quantize_weight", "weight_bits",
]  # fmt: skip

LARGEST_CODE = 127.0


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """A stored weight: `codes` int8 `[N, ...]`, `scale` float32 `[N]`."""

    codes: torch.Tensor
    scale: torch.Tensor


def _broadcast(scale: torch.Tensor, num_axes: int, axis: int) -> torch.Tensor:
    """View a vector of scales along `axis` of a tensor with `num_axes` axes; pass a 0-dim one."""
    if scale.ndim == 0:
        return scale
    shape = [1] * num_axes
    shape[axis] = -1
    return scale.view(shape)


def weight_bits(shape: tuple[int, ...]) -> int:
    """Bits of a stored weight of `shape` `[N, ...]`, scales counted."""
    return math.prod(shape) * 8 + shape[0] * 32


def quantize_weight(weight: torch.Tensor, *, name: str = "weight") -> Int8Weight:
    """Quantize `weight` `[N, ...]` with one scale for each of its N output channels.

    Raises:
        InputError: see `operands.check_weight`.
    """
    weight = operands.check_weight(weight, name)
    scale = operands.weight_scale(weight.flatten(1).abs().amax(1), LARGEST_CODE)
    codes = (weight / _broadcast(scale, weight.ndim, 0)).round_().clamp_(-128, 127)
    return Int8Weight(codes=codes.to(torch.int8), scale=scale)


def input_scale(amax: float) -> torch.Tensor:
    """Static scale of an input whose largest calibrated magnitude is `amax`, 0-dim float32."""
    return operands.input_scale(amax, LARGEST_CODE)


@torch.library.custom_op("vcompress::int8_quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """Round `x` to what INT8 can hold; same shape and type.

    Args:
        x: any shape, any floating-point type; the arithmetic is float32.
        scale: float32, 0-dim for one scale a tensor, else one for each index of `axis`.
        axis: ignored with a 0-dim scale.
    """
    divisor = _broadcast(scale, x.ndim, axis)
    return (x.float() / divisor).round_().clamp_(-128, 127).mul_(divisor).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vcompress::int8_quantize_dequantize_per_token", mutates_args=())
def quantize_dequantize_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round each token of `x` to what INT8 can hold with a scale of its own, amax / 127.

    Args:
        x: `[..., K]`, K any size, any floating-point type; the arithmetic is float32. The result
            has its shape and type and is contiguous.
    """
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    values = x.float().clamp(-operands.LARGEST_VALUE, operands.LARGEST_VALUE).contiguous()
    scale = operands.weight_scale(values.abs().amax(-1, keepdim=True), LARGEST_CODE)
    return values.div_(scale).round_().mul_(scale).to(x.dtype)


@quantize_dequantize_per_token.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::int8_dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """The float32 values of int8 `codes`; `scale` and `axis` as in `quantize_dequantize`."""
    return codes.float().mul_(_broadcast(scale, codes.ndim, axis))


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[N, ...]` after a round trip through INT8, in its own type."""
    stored = quantize_weight(weight)
    values: torch.Tensor = dequantize(stored.codes, stored.scale, 0)
    return values.to(weight.dtype)
