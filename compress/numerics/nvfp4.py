"""NVFP4: four-bit floating-point numbers with a scale for every 16 of them, W4A4.

What: a value is `e2m1 * block_scale * tensor_scale`. E2M1 elements are 0, .5, 1, 1.5, 2, 3, 4, 6
and their negatives; 16 neighbours along the contraction share an E4M3 block scale; the tensor has
one float32 scale, amax / (6 * 448). 4.5 bits a value.
Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (https://arxiv.org/abs/2509.25149),
and the FLOAT4E2M1 type of ONNX. Stored weights are equal, bit for bit, to those of modelopt's
`NVFP4QTensor`; elements round like `ml_dtypes.float4_e2m1fn`, half to even.
What we changed: a weight of zeros alone has tensor scale 1.0 (modelopt: NaN); tensor scales are at
least 2^-100, as runtimes flush subnormal numbers; rounding is arithmetic on the bits of float32
instead of a search, several times faster.
Outside the range: an input's tensor scale is static, its block scales are dynamic. A block whose
amax exceeds the calibrated one gets the largest block scale, 448, so that its values saturate at
the calibrated amax; infinities too. NaN makes its whole block NaN, as its scale is.

Shapes: N output channels, K contraction, 16 values a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import operands
from vcompress.compress.numerics.rounding import round_mantissa_
from vcompress.spec.errors import InputError

__all__ = [
    "BLOCK_SIZE", "ELEMENT_VALUES", "LARGEST_CODE", "Nvfp4Weight", "dequantize",
    "fake_quantize_weight", "input_scale", "pack", "quantize_dequantize", "quantize_weight",
    "unpack",
]  # fmt: skip

BLOCK_SIZE = 16
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
_LARGEST_ELEMENT = 6.0
_SMALLEST_BLOCK_SCALE = 2.0**-9
_LARGEST_BLOCK_SCALE = 448.0
LARGEST_CODE = _LARGEST_ELEMENT * _LARGEST_BLOCK_SCALE
# 256 Ki values are 1 MiB: all temporaries of a piece stay in the cache.
_PIECE = 2**18


@dataclass(frozen=True, kw_only=True)
class Nvfp4Weight:
    """A stored weight `[N, K]`.

    Attributes:
        packed: uint8 `[N, K/2]`, two elements a byte, the even index in the low four bits.
        block_scale: float8_e4m3fn `[N, K/16]`.
        tensor_scale: float32, 0-dim.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    tensor_scale: torch.Tensor


def _check_contraction(size: int, what: str) -> None:
    if size == 0 or size % BLOCK_SIZE:
        message = (
            f"nvfp4 needs a last axis divisible by {BLOCK_SIZE} and not empty, {what} has {size}; "
            "choose another format for the layer"
        )
        raise InputError(message)


def _block_scale(blocks: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """E4M3 scales `[..., 1]` of float32 `blocks` `[..., 16]`; 1.0 for a block of zeros."""
    smallest, largest = torch.aminmax(blocks, dim=-1, keepdim=True)
    scale = torch.maximum(largest, smallest.neg_()) / (_LARGEST_ELEMENT * tensor_scale)
    scale.masked_fill_(scale == 0, 1.0).clamp_(_SMALLEST_BLOCK_SCALE, _LARGEST_BLOCK_SCALE)
    return scale.to(torch.float8_e4m3fn)


def _round_elements_(scaled: torch.Tensor) -> torch.Tensor:
    """Round float32 values to E2M1 in place, saturating at 6."""
    scaled.clamp_(-_LARGEST_ELEMENT, _LARGEST_ELEMENT)
    return round_mantissa_(scaled, num_bits=1, smallest_normal=1.0)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put pairs of four-bit `codes` (uint8 `[..., K]`, K even) into bytes `[..., K/2]`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: bytes `[..., K/2]` to four-bit codes, uint8 `[..., K]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def quantize_weight(weight: torch.Tensor, *, name: str = "weight") -> Nvfp4Weight:
    """Quantize `weight` `[N, K]`, with K divisible by 16.

    Raises:
        InputError: see `operands.check_weight`; not two axes; K not divisible by 16.
    """
    weight = operands.check_weight(weight, name)
    if weight.ndim != 2:
        message = (
            f"{name} must have shape [N, K] for nvfp4, got {list(weight.shape)}; use int8 or fp8 "
            "for convolutions"
        )
        raise InputError(message)
    _check_contraction(weight.shape[1], name)
    tensor_scale = operands.weight_scale(weight.abs().amax(), LARGEST_CODE)
    blocks = weight.reshape(weight.shape[0], -1, BLOCK_SIZE)
    block_scale = _block_scale(blocks, tensor_scale)
    scaled = blocks / (block_scale.float() * tensor_scale)
    sign = (scaled < 0).to(torch.uint8) << 3
    # Twice an element is 0, 1, 2, 3, 4, 6, 8 or 12; the three terms give its code, 0 to 7.
    twice = _round_elements_(scaled).abs_().mul_(2).to(torch.uint8)
    codes = torch.minimum(torch.minimum(twice, (twice >> 1) + 2), (twice >> 2) + 4)
    return Nvfp4Weight(
        packed=pack((codes | sign).flatten(1)),
        block_scale=block_scale.squeeze(-1).contiguous(),
        tensor_scale=tensor_scale,
    )


def input_scale(amax: float) -> torch.Tensor:
    """Tensor scale of an input whose largest calibrated magnitude is `amax`, 0-dim float32."""
    return operands.input_scale(amax, LARGEST_CODE)


@torch.library.custom_op("vcompress::nvfp4_quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Round `x` to what NVFP4 can hold, with block scales from `x` itself; same shape and type.

    Args:
        x: `[..., K]`, K divisible by 16, any floating-point type; the arithmetic is float32.
        tensor_scale: 0-dim float32.

    Raises:
        InputError: K is not divisible by 16.
    """
    _check_contraction(x.shape[-1], "the input")
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    values, rounded = x.reshape(-1), result.view(-1)
    for start in range(0, values.numel(), _PIECE):
        blocks = values[start : start + _PIECE].view(-1, BLOCK_SIZE).float()
        scale = _block_scale(blocks, tensor_scale).float().mul_(tensor_scale)
        elements = _round_elements_(blocks / scale)
        torch.mul(elements, scale, out=rounded[start : start + _PIECE].view(-1, BLOCK_SIZE))
    return result


@quantize_dequantize.register_fake
def _(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    _check_contraction(x.shape[-1], "the input")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::nvfp4_dequantize", mutates_args=())
def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor
) -> torch.Tensor:
    """The float32 values `[N, K]` of a stored weight; arguments as in `Nvfp4Weight`."""
    values = torch.tensor(ELEMENT_VALUES, device=packed.device)
    # One look-up fetches both elements of a byte: two float32 seen as one int64.
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
    both = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    blocks = both.view(torch.float32).view(*block_scale.shape, BLOCK_SIZE)
    return blocks.mul_((block_scale.float() * tensor_scale).unsqueeze(-1)).flatten(-2)


@dequantize.register_fake
def _(packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[N, K]` after a round trip through NVFP4, in its own type."""
    stored = quantize_weight(weight)
    values: torch.Tensor = dequantize(stored.packed, stored.block_scale, stored.tensor_scale)
    return values.to(weight.dtype)
