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

Four over six (Cook et al., https://arxiv.org/abs/2512.02010): between 4 and 6 there is no element,
so a block whose values crowd below its largest one is nearer if that becomes 4. Of the two scales,
amax / 6 and amax / 4, the one with the smaller squared error is taken, 6 if they are equal; the
tensor scale is amax / (6 * 256), so that a scale half as large again still fits. For weights only,
as modelopt's NVFP4_FOUR_OVER_SIX. Equal to what modelopt exports: tensor scale, both candidate
scales to the bit, and the elements of the chosen one. Different: errors are summed in units of the
tensor scale, so that the choice may differ where the two agree to float32's rounding; a block of
zeros has scale 1.0 (modelopt: 1.0 / tensor_scale, clamped); modelopt's scales are infinite before
their clamp when amax is above 2^122.

Shapes: N output channels, K contraction, divisible by 16.

| stored | type | shape | bits a value |
|---|---|---|---|
| packed | uint8, the even index in the low four bits | [N, K/2] | 4 |
| block_scale | float8_e4m3fn | [N, K/16] | 0.5 |
| tensor_scale | float32 | [] | 32 / (N K) |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.numerics import e2m1, operands
from vcompress.compress.numerics.e2m1 import ELEMENT_VALUES, LARGEST_ELEMENT, pack, unpack

__all__ = [
    "BLOCK_SIZE", "ELEMENT_VALUES", "LARGEST_CODE", "Nvfp4Weight", "dequantize",
    "fake_quantize_weight", "input_scale", "pack", "quantize_dequantize", "quantize_weight",
    "unpack", "weight_bits",
]  # fmt: skip

BLOCK_SIZE = 16
_SMALLEST_BLOCK_SCALE = 2.0**-9
_LARGEST_BLOCK_SCALE = 448.0
LARGEST_CODE = LARGEST_ELEMENT * _LARGEST_BLOCK_SCALE
# 1.5 * 256 = 384 is an E4M3 number: mapping the largest block to 4 stays in the range.
_FOUR_OVER_SIX_LARGEST_CODE = LARGEST_ELEMENT * 256.0
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


def _block_amax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes `[..., 1]` of `blocks` `[..., 16]`; NaN where there is one."""
    # Folding halves is vectorised, a reduction of 16 neighbours is not.
    magnitude, width = blocks.abs(), BLOCK_SIZE // 2
    while width:
        magnitude = torch.maximum(magnitude[..., :width], magnitude[..., width:])
        width //= 2
    return magnitude


def _to_e4m3(scale: torch.Tensor) -> torch.Tensor:
    """Block scales as E4M3, which are never zero; 1.0 for 0. Overwrites `scale`."""
    scale.masked_fill_(scale == 0, 1.0).clamp_(_SMALLEST_BLOCK_SCALE, _LARGEST_BLOCK_SCALE)
    return scale.to(torch.float8_e4m3fn)


def _block_scale(blocks: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """E4M3 scales `[..., 1]` of float32 `blocks` `[..., 16]`; 1.0 for a block of zeros."""
    return _to_e4m3(_block_amax(blocks) / (LARGEST_ELEMENT * tensor_scale))


def _four_over_six_scale(blocks: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """As `_block_scale`; maps the largest value of each block to 6 or, if that is nearer, to 4."""
    amax = _block_amax(blocks)
    # In units of the tensor scale no square overflows.
    units = blocks / tensor_scale
    scales, errors = [], []
    for multiplier in (1.0, 1.5):
        # The order of these operations is modelopt's; any other would round some scales otherwise.
        scale = _to_e4m3(amax * multiplier / LARGEST_ELEMENT / tensor_scale)
        rounded = e2m1.round_(units / scale.float()).mul_(scale.float())
        errors.append(rounded.sub_(units).square_().sum(-1, keepdim=True))
        scales.append(scale.float())
    six, four = scales
    return torch.where(errors[1] < errors[0], four, six).to(torch.float8_e4m3fn)


def weight_bits(shape: tuple[int, int]) -> int:
    """Bits of a stored weight of `shape` `[N, K]`, scales counted: 4.5 a value, and 32."""
    count = shape[0] * shape[1]
    return count * 4 + count // BLOCK_SIZE * 8 + 32


def quantize_weight(
    weight: torch.Tensor, *, four_over_six: bool = False, name: str = "weight"
) -> Nvfp4Weight:
    """Quantize `weight` `[N, K]`, with K divisible by 16.

    Args:
        weight: any floating-point type; the arithmetic is float32.
        four_over_six: choose for each block whether its largest value becomes 6 or 4. Mostly
            lowers the error, takes two more roundings; stored and computed with alike.
        name: what the error calls the weight.

    Raises:
        InputError: see `operands.largest_magnitude`; not two axes; K not divisible by 16.
    """
    amax = operands.largest_magnitude(weight, name)
    operands.check_matrix_shape(weight.shape, name, format="nvfp4", block_size=BLOCK_SIZE)
    largest_code = _FOUR_OVER_SIX_LARGEST_CODE if four_over_six else LARGEST_CODE
    tensor_scale = operands.weight_scale(amax, largest_code)
    choose_scale = _four_over_six_scale if four_over_six else _block_scale
    values = weight.detach().reshape(-1, BLOCK_SIZE)
    packed = values.new_empty((len(values), BLOCK_SIZE // 2), dtype=torch.uint8)
    block_scale = values.new_empty((len(values), 1), dtype=torch.float8_e4m3fn)
    for start in range(0, len(values), _PIECE // BLOCK_SIZE):
        piece = slice(start, start + _PIECE // BLOCK_SIZE)
        blocks = values[piece].float()
        scale = choose_scale(blocks, tensor_scale)
        block_scale[piece] = scale
        packed[piece] = pack(e2m1.encode(blocks / scale.float().mul_(tensor_scale)))
    return Nvfp4Weight(
        packed=packed.view(weight.shape[0], -1),
        block_scale=block_scale.view(weight.shape[0], -1),
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
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "nvfp4", "the input")
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    values, rounded = x.reshape(-1), result.view(-1)
    for start in range(0, values.numel(), _PIECE):
        blocks = values[start : start + _PIECE].view(-1, BLOCK_SIZE).float()
        scale = _block_scale(blocks, tensor_scale).float().mul_(tensor_scale)
        elements = e2m1.round_(blocks / scale)
        torch.mul(elements, scale, out=rounded[start : start + _PIECE].view(-1, BLOCK_SIZE))
    return result


@quantize_dequantize.register_fake
def _(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    operands.check_blocks(x.shape[-1], BLOCK_SIZE, "nvfp4", "the input")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vcompress::nvfp4_dequantize", mutates_args=())
def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor
) -> torch.Tensor:
    """The float32 values `[N, K]` of a stored weight; arguments as in `Nvfp4Weight`."""
    blocks = e2m1.decode(packed).view(*block_scale.shape, BLOCK_SIZE)
    return blocks.mul_((block_scale.float() * tensor_scale).unsqueeze(-1)).flatten(-2)


@dequantize.register_fake
def _(packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float32)


def fake_quantize_weight(weight: torch.Tensor, *, four_over_six: bool = False) -> torch.Tensor:
    """`weight` `[N, K]` after a round trip through NVFP4, in its own type."""
    stored = quantize_weight(weight, four_over_six=four_over_six)
    values: torch.Tensor = dequantize(stored.packed, stored.block_scale, stored.tensor_scale)
    return values.to(weight.dtype)
