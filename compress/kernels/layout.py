"""How a packed weight lies in memory for the kernels: as large as it is stored, in another order.

What: a kernel multiplies chunks of the contraction, and must not shuffle values between lanes to
unpack one. Byte j of a chunk of 2 H values therefore holds value j in its low and value j + H in
its high four bits: both halves of a chunk come from the same bytes by a mask and a shift. The
contraction is padded to whole chunks with zeros. INT4 codes stay two's complement. Eight-bit codes
and scales stay as they are stored.

Shapes: N output channels, K contraction, H half a chunk, G values of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from vcompress.compress.numerics import e2m1
from vcompress.compress.stored import CODECS

__all__ = ["PackedWeight", "half_chunk", "pack", "stored", "unit_of", "unscaled"]

_WIDE = 128


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight `[N, K]` as the kernels take it.

    Attributes:
        kind: "nvfp4", "mxfp4", "int4", "mxfp8", "fp8" or "int8".
        codes: uint8 `[N, ceil(K / 2H) * H]`, or float8_e4m3fn or int8 `[N, K]`.
        group_scale: `[N, K/G]`, E4M3 or E8M0 as bytes, or float16; empty where there is none.
        scale: float32, of the tensor `[1]` or of the outputs `[N]`.
    """

    kind: str
    codes: torch.Tensor
    group_scale: torch.Tensor
    scale: torch.Tensor


def half_chunk(contraction: int) -> int:
    """H for a contraction: 64, or 32 where wide chunks would be padded."""
    return _WIDE // 2 if contraction % _WIDE == 0 else _WIDE // 4


def pack(buffers: Mapping[str, torch.Tensor], format: str) -> PackedWeight:
    """The weight of a linear layer in `format`, whose stored buffers are `buffers`."""
    kind = format.partition("_")[0]
    one = torch.ones(1, device=next(iter(buffers.values())).device)
    if "weight_packed" not in buffers:
        codes = buffers["weight_quantized"]
        if kind == "mxfp8":
            scales = buffers["weight_block_scale"]
            return PackedWeight(kind=kind, codes=codes, group_scale=scales, scale=one)
        none = codes.new_empty(0, dtype=torch.uint8)
        scale = buffers["weight_scale"].reshape(-1)
        return PackedWeight(kind=kind, codes=codes, group_scale=none, scale=scale)
    groups = buffers["weight_scale" if kind == "int4" else "weight_block_scale"]
    scale = buffers["weight_tensor_scale"].reshape(1) if kind == "nvfp4" else one
    return PackedWeight(
        kind=kind, codes=_reordered(buffers["weight_packed"]),
        group_scale=groups.view(torch.uint8) if kind == "nvfp4" else groups, scale=scale,
    )  # fmt: skip


def _reordered(packed: torch.Tensor) -> torch.Tensor:
    """Stored bytes `[N, K/2]`, neighbours together, to bytes of chunks."""
    codes = e2m1.unpack(packed)
    half = half_chunk(codes.shape[1])
    codes = functional.pad(codes, (0, -codes.shape[1] % (2 * half)))
    chunks = codes.view(len(codes), -1, 2, half)
    return (chunks[:, :, 0] | (chunks[:, :, 1] << 4)).flatten(1).contiguous()


def stored(weight: PackedWeight, contraction: int) -> dict[str, torch.Tensor]:
    """The inverse of `pack`."""
    if weight.group_scale.numel() == 0:
        scale = weight.scale
        if weight.kind == "fp8" and scale.numel() == 1:
            scale = scale.reshape(())
        return {"weight_quantized": weight.codes, "weight_scale": scale}
    if weight.kind == "mxfp8":
        return {"weight_quantized": weight.codes, "weight_block_scale": weight.group_scale}
    half = half_chunk(contraction)
    chunks = weight.codes.view(len(weight.codes), -1, half)
    codes = torch.stack((chunks & 15, chunks >> 4), dim=2).flatten(1)[:, :contraction]
    packed = e2m1.pack(codes)
    if weight.kind == "int4":
        return {"weight_packed": packed, "weight_scale": weight.group_scale}
    if weight.kind == "mxfp4":
        return {"weight_packed": packed, "weight_block_scale": weight.group_scale}
    return {
        "weight_packed": packed,
        "weight_block_scale": weight.group_scale.view(torch.float8_e4m3fn),
        "weight_tensor_scale": weight.scale.reshape(()),
    }


def unit_of(weight: PackedWeight, contraction: int, largest_code: float) -> torch.Tensor:
    """float32 `[N]`: what code 1 stands for, in units of the tensor scale, for eight-bit codes.

    The largest value of each output channel becomes `largest_code`.
    """
    values = unscaled(weight, contraction)
    amax = values.abs().amax(1)
    return torch.where(amax == 0, torch.ones_like(amax), amax / largest_code)


def unscaled(weight: PackedWeight, contraction: int) -> torch.Tensor:
    """The float32 values `[N, K]` of a weight with groups, before `scale`."""
    buffers = stored(weight, contraction)
    if weight.kind == "nvfp4":
        buffers["weight_tensor_scale"] = torch.ones((), device=weight.codes.device)
    format = "int4_g32" if weight.kind == "int4" else weight.kind
    return CODECS[format].dequantize(buffers)
