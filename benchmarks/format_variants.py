"""Our arithmetic with single steps replaced, which is how other libraries are explained.

Each function quantizes a weight `[N, K]` as one reference of `format_references` does, written down
from what the reference computes; `because` of that reference names the replaced steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vcompress.benchmarks.format_stored import Stored, blocks_of
from vcompress.compress.numerics import e2m1

__all__ = [
    "eight_bits_in_own_type", "fp8_of_torchao", "int4_of_modelopt", "integers_of_torchao",
    "microscaling_of_torchao", "mxfp4_of_modelopt", "mxfp8_of_modelopt", "nvfp4_of_torchao",
    "nvfp4_without_bound", "power", "with_signs_of_zeros",
]  # fmt: skip

Quantize = Callable[[torch.Tensor], Stored]


def power(biased_exponent: torch.Tensor) -> torch.Tensor:
    """float32 2^(e - 127) of E8M0 codes."""
    return torch.exp2(biased_exponent.float() - 127)


def _elements(scaled: torch.Tensor) -> torch.Tensor:
    """E2M1 elements of any float32; zeros are positive, NaN has the largest magnitude."""
    scaled = scaled.nan_to_num(6.0, 6.0, -6.0).flatten(-2).contiguous()
    return e2m1.decode(e2m1.pack(e2m1.encode(scaled)))


def with_signs_of_zeros(quantize: Quantize) -> Quantize:
    """Negative zeros stay negative."""

    def variant(weight: torch.Tensor) -> Stored:
        stored = quantize(weight)
        signed = torch.copysign(stored.elements, weight.float())
        elements = torch.where(weight == 0, signed, stored.elements)
        return Stored(elements, stored.scales, stored.tensor_scale)

    return variant


def _e4m3(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def nvfp4_without_bound(weight: torch.Tensor) -> Stored:
    """Tensor scales that are 0 or subnormal stay so."""
    weight = weight.float()
    tensor_scale = weight.abs().amax() / (6 * 448)
    blocks = blocks_of(weight, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / (6 * tensor_scale)
    scale = scale.masked_fill(scale == 0, 1.0).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float()
    elements = _elements(blocks / (scale * tensor_scale))
    return Stored(elements, scale.squeeze(-1), tensor_scale)


def nvfp4_of_torchao(weight: torch.Tensor) -> Stored:
    """Reciprocals, one more rounding of the block scale, and its other bound."""
    weight = weight.float()
    tensor_scale = weight.abs().amax() / (6 * 448)
    blocks = blocks_of(weight, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / 6 / tensor_scale
    scale = scale.clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float()
    scaled = blocks * (1 / tensor_scale / scale)
    # What is NaN gets the code of 2 there.
    elements = _elements(torch.where(scaled.isnan(), 2.0, scaled))
    return Stored(torch.copysign(elements, scaled.flatten(-2)), scale.squeeze(-1), tensor_scale)


def _logarithmic(amax: torch.Tensor, largest: float) -> torch.Tensor:
    return torch.exp2(torch.log2(amax / largest).ceil().clamp(-127, 127))


def mxfp4_of_modelopt(weight: torch.Tensor) -> Stored:
    """A rounded logarithm, three ties toward zero and negative zeros."""
    blocks = blocks_of(weight.float(), 32)
    scale = _logarithmic(blocks.abs().amax(-1, keepdim=True), 6)
    scaled = blocks / scale
    # Half a step lower, the three ties are no ties any more.
    lower = scaled.abs() - torch.isin(scaled.abs(), torch.tensor([0.75, 1.75, 3.5])) * 0.125
    elements = torch.copysign(_elements(lower), scaled.flatten(-2))
    elements = torch.where(scaled.flatten(-2) == 0, -torch.zeros_like(elements), elements)
    return Stored(elements, scale.squeeze(-1))


def mxfp8_of_modelopt(weight: torch.Tensor) -> Stored:
    """A rounded logarithm."""
    blocks = blocks_of(weight.float(), 32)
    scale = _logarithmic(blocks.abs().amax(-1, keepdim=True), 448)
    return Stored(_e4m3(blocks * (1 / scale)).flatten(-2), scale.squeeze(-1))


def microscaling_of_torchao(format: str, *, floor: bool) -> Quantize:
    """A rounded logarithm, or the scale rounded down."""
    largest, exponent = (6.0, 2) if format == "mxfp4" else (448.0, 8)

    def quantize(weight: torch.Tensor) -> Stored:
        blocks = blocks_of(weight.float(), 32)
        amax = blocks.abs().amax(-1, keepdim=True)
        if floor:
            # frexp gives a mantissa below 1: its exponent is one too high.
            unbiased = torch.where(amax < 2.0**-126, -127, torch.frexp(amax).exponent - 1)
            scale = torch.exp2((unbiased - exponent).clamp(-127, 127).float())
            scaled = blocks / scale.clamp(min=2.0**-126)
        else:
            scale = _logarithmic(amax, largest)
            scaled = blocks * torch.where(scale == 2.0**-127, 1.0, 1 / scale)
        if format == "mxfp8":
            return Stored(_e4m3(scaled).flatten(-2), scale.squeeze(-1))
        elements = torch.copysign(_elements(scaled), scaled.flatten(-2))
        return Stored(elements, scale.squeeze(-1))

    return quantize


def eight_bits_in_own_type(format: str) -> Quantize:
    """Scale and division in the type of the weight, no scale is too small."""
    largest = 127.0 if format == "int8" else 448.0

    def quantize(weight: torch.Tensor) -> Stored:
        amax = weight.abs().amax(-1, keepdim=True)
        scale = (amax.amax(0, keepdim=True) if format == "fp8" else amax) / largest
        scaled = weight / scale
        if format == "int8":
            elements = scaled.round().clamp(-128, 127).to(torch.int8).float()
        else:
            elements = scaled.to(torch.float8_e4m3fn).float()
        return Stored(elements, scale.float())

    return quantize


def fp8_of_torchao(format: str) -> Quantize:
    """The scale in the type of the weight, no scale is too small."""

    def quantize(weight: torch.Tensor) -> Stored:
        amax = weight.abs().amax(-1, keepdim=True)
        scale = ((amax.amax(0, keepdim=True) if format == "fp8" else amax) / 448).float()
        return Stored(_e4m3(weight.float() / scale), scale)

    return quantize


def int4_of_modelopt(group: int) -> Quantize:
    """7 / amax in the type of the weight, and a product."""

    def quantize(weight: torch.Tensor) -> Stored:
        groups = blocks_of(weight, group)
        inverse = 7 / groups.abs().amax(-1, keepdim=True)
        codes = ((groups * inverse).round().clamp(-8, 7) + 8).to(torch.uint8).float() - 8
        return Stored(codes.flatten(-2), 1 / inverse.squeeze(-1).float())

    return quantize


def integers_of_torchao(format: str, group: int | None) -> Quantize:
    """The scale in the type of the weight, a reciprocal, and a scale that can be 2^-126."""
    largest = 127.0 if format == "int8" else 7.0

    def quantize(weight: torch.Tensor) -> Stored:
        groups = blocks_of(weight, group or weight.shape[1])
        scale = groups.abs().amax(-1, keepdim=True) / largest
        scale = scale.clamp(min=torch.finfo(weight.dtype).smallest_normal).float()
        codes = (groups * (1 / scale)).round().clamp(-largest - 1, largest)
        # Integers have no negative zero.
        return Stored(codes.flatten(-2) + 0.0, scale.squeeze(-1))

    return quantize
