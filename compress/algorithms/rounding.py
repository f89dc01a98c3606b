"""Rounding a weight with scales that are given, in every format.

What: a format is a grid of numbers, elements times a scale. `numerics` takes the scale from the
largest magnitude of a block; here scales are fixed beforehand, by a search or by whoever chose
them, and the result is packed as the format stores it.
Source: the formats are those of `numerics`; four over six is Cook et al.,
https://arxiv.org/abs/2512.02010.
What we changed: nothing; with `largest_scales` weights equal in every value those that
`numerics` quantizes (a small negative number may become 0 instead of -0).

Shapes: N output channels, K contraction, B block, G = K / B blocks a row; formats with a scale a
channel have one block of K values a row, with one scale a tensor one row of scales as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vcompress.compress.numerics import e2m1, fp8, int4, microscaling, nvfp4, operands
from vcompress.compress.numerics.rounding import round_mantissa_
from vcompress.compress.stored import as_bytes

__all__ = [
    "GRIDS", "Grid", "Scales", "block_amax", "four_over_six_scales", "largest_scales",
    "pack_weight", "round_weight", "tensor_scale",
]  # fmt: skip

# With this the tensor's largest block has scale 256, and 1.75 times that is still an E4M3 number.
_NVFP4_CODE_WITH_HEADROOM = 6 * 256.0


def _round_e4m3_(scaled: torch.Tensor) -> torch.Tensor:
    scaled.clamp_(-fp8.LARGEST_CODE, fp8.LARGEST_CODE)
    return round_mantissa_(scaled, num_bits=3, smallest_normal=2.0**-6)


def _round_int8_(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round_().clamp_(-128, 127)


def _round_int4_(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round_().clamp_(-8, 7)


def _any_scale(scale: torch.Tensor, _tensor_scale: torch.Tensor | None) -> torch.Tensor:
    return scale.clamp(min=operands.SMALLEST_SCALE)


def _e4m3_scale(scale: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    units = (scale / tensor).clamp_(2.0**-9, 448.0)
    return units.to(torch.float8_e4m3fn).float().mul_(tensor)


def _power_of_two_scale(scale: torch.Tensor, _tensor_scale: torch.Tensor | None) -> torch.Tensor:
    bits = scale.clamp(min=operands.SMALLEST_SCALE).view(torch.int32)
    return (bits + 0x007FFFFF).bitwise_and_(0x7F800000).view(torch.float32)


def _float16_scale(scale: torch.Tensor, _tensor_scale: torch.Tensor | None) -> torch.Tensor:
    return scale.clamp(2.0**-24, 65504.0).half().float()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a format can hold.

    Attributes:
        block_size: values that share a scale; 0 for a whole row, -1 for the whole tensor.
        largest_code: largest magnitude of an element.
        round_elements_: rounds contiguous float32 values to elements, in place.
        allowed_scale: positive float32 scales, the tensor scale or None -> such as are stored.
    """

    block_size: int
    largest_code: float
    round_elements_: Callable[[torch.Tensor], torch.Tensor]
    allowed_scale: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

    def blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` `[N, K]` seen as `[N, G, B]`."""
        return weight.reshape(len(weight), -1, self.block_size if self.block_size > 0 else
                              weight.shape[1])  # fmt: skip


def _grid(
    block_size: int, largest_code: float, round_elements_: Callable[[torch.Tensor], torch.Tensor],
    allowed_scale: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = _any_scale,
) -> Grid:  # fmt: skip
    return Grid(
        block_size=block_size, largest_code=largest_code, round_elements_=round_elements_,
        allowed_scale=allowed_scale,
    )  # fmt: skip


GRIDS: dict[str, Grid] = {
    "nvfp4": _grid(nvfp4.BLOCK_SIZE, 6.0, e2m1.round_, _e4m3_scale),
    "mxfp4": _grid(microscaling.BLOCK_SIZE, 6.0, e2m1.round_, _power_of_two_scale),
    "mxfp8": _grid(microscaling.BLOCK_SIZE, 448.0, _round_e4m3_, _power_of_two_scale),
    "fp8": _grid(-1, 448.0, _round_e4m3_),
    "fp8_channel": _grid(0, 448.0, _round_e4m3_),
    "int8": _grid(0, 127.0, _round_int8_),
    "int8_token": _grid(0, 127.0, _round_int8_),
    **{
        f"int4_g{size}": _grid(size, 7.0, _round_int4_, _float16_scale) for size in int4.GROUP_SIZES
    },
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Scales:
    """Scales that a weight `[N, K]` is rounded with.

    Attributes:
        format: a key of `GRIDS`.
        blocks: float32 `[N, G]`, or `[1, 1]` for one scale a tensor: what an element is multiplied
            by, tensor scale included.
        tensor: the tensor scale of nvfp4, 0-dim float32; else None.
    """

    format: str
    blocks: torch.Tensor
    tensor: torch.Tensor | None = None


def tensor_scale(weight: torch.Tensor, format: str, *, headroom: bool) -> torch.Tensor | None:
    """The scale of the whole tensor, for formats that have one beside those of blocks.

    Args:
        headroom: leave room for block scales larger than that of the largest magnitude.
    """
    if format != "nvfp4":
        return None
    code = _NVFP4_CODE_WITH_HEADROOM if headroom else nvfp4.LARGEST_CODE
    return operands.weight_scale(weight.abs().amax(), code)


def block_amax(blocks: torch.Tensor, format: str) -> torch.Tensor:
    """Largest magnitudes of `blocks` `[N, G, B]`: `[N, G]`, or `[1, 1]` for one scale a tensor."""
    amax = blocks.abs().amax(-1)
    return amax.amax().view(1, 1) if GRIDS[format].block_size < 0 else amax


def largest_scales(weight: torch.Tensor, format: str) -> Scales:
    """Scales that map the largest magnitude of each block to the largest element."""
    grid, tensor = GRIDS[format], tensor_scale(weight, format, headroom=False)
    amax = block_amax(grid.blocks(weight), format)
    if tensor is None:
        exact = operands.weight_scale(amax, grid.largest_code)
        return Scales(format=format, blocks=grid.allowed_scale(exact, None))
    # In the order of numerics.nvfp4, as another one would round some scales otherwise.
    units = amax / (grid.largest_code * tensor)
    units = units.masked_fill(units == 0, 1.0)
    return Scales(format=format, blocks=_e4m3_scale(units, units.new_ones(())) * tensor,
                  tensor=tensor)  # fmt: skip


def four_over_six_scales(weight: torch.Tensor) -> Scales:
    """NVFP4 scales that map the largest magnitude of each block to 6 or, if nearer, to 4."""
    packed = nvfp4.quantize_weight(weight, four_over_six=True)
    blocks = packed.block_scale.float() * packed.tensor_scale
    return Scales(format="nvfp4", blocks=blocks, tensor=packed.tensor_scale)


def round_weight(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """`weight` `[N, K]` rounded to nearest with fixed scales: float32 values on the grid."""
    grid = GRIDS[scales.format]
    divisor = scales.blocks.unsqueeze(-1)
    elements = grid.round_elements_((grid.blocks(weight) / divisor).contiguous())
    return elements.mul_(divisor).reshape(weight.shape)


def pack_weight(values: torch.Tensor, scales: Scales) -> Mapping[str, torch.Tensor]:
    """The buffers of a frozen layer that hold `values` `[N, K]`, which are on the grid."""
    grid, format = GRIDS[scales.format], scales.format
    scaled = (grid.blocks(values) / scales.blocks.unsqueeze(-1)).contiguous()
    if format in ("nvfp4", "mxfp4"):
        buffers = {"weight_packed": e2m1.pack(e2m1.encode(scaled.flatten(1)))}
        if scales.tensor is None:
            return {**buffers, "weight_block_scale": _e8m0(scales.blocks)}
        units = (scales.blocks / scales.tensor).to(torch.float8_e4m3fn)
        return {**buffers, "weight_block_scale": units, "weight_tensor_scale": scales.tensor}
    elements = grid.round_elements_(scaled).flatten(1)
    if format == "mxfp8":
        codes = elements.to(torch.float8_e4m3fn)
        return {"weight_quantized": codes, "weight_block_scale": _e8m0(scales.blocks)}
    if format.startswith("int4"):
        packed = int4.pack(elements.to(torch.int8).contiguous())
        return {"weight_packed": packed, "weight_scale": scales.blocks.half()}
    dtype = torch.float8_e4m3fn if format.startswith("fp8") else torch.int8
    scale = scales.blocks.reshape(()) if format == "fp8" else scales.blocks.flatten()
    return {"weight_quantized": elements.to(dtype), "weight_scale": scale.clone()}


def _e8m0(scales: torch.Tensor) -> torch.Tensor:
    return as_bytes(microscaling.encode_scale(scales))
