"""How each format stores a weight and rounds an input: one entry a format.

What: the names of `spec.formats` meet the arithmetic of `numerics` here and nowhere else. A codec
says which buffers a stored weight has, what they stand for, and what becomes of an input.

| format | buffers of a stored weight |
|---|---|
| nvfp4 | `weight_packed`, `weight_block_scale`, `weight_tensor_scale` |
| mxfp4 | `weight_packed`, `weight_block_scale` |
| int4_g... | `weight_packed`, `weight_scale` |
| mxfp8 | `weight_quantized`, `weight_block_scale` |
| fp8, fp8_channel, int8, int8_token | `weight_quantized`, `weight_scale` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from vcompress.compress.numerics import fp8, int4, int8, mxfp4, mxfp8, nvfp4
from vcompress.spec.errors import InputError

__all__ = ["CODECS", "Buffers", "Codec", "as_bytes", "check_stored"]

Buffers = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The arithmetic of one format.

    Attributes:
        quantize: weight `[N, ...]`, name for errors -> buffers.
        dequantize: buffers -> the float32 weight.
        input_scale: largest magnitude of the input -> its static scale; None if it has none.
        round_input: input, static scale or None -> what the format can hold of it.
    """

    quantize: Callable[[torch.Tensor, str], dict[str, torch.Tensor]]
    dequantize: Callable[[Buffers], torch.Tensor]
    input_scale: Callable[[float], torch.Tensor] | None
    round_input: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """`stored`, but E8M0 scales as uint8: exporters have no such type, the bytes are equal."""
    return stored.view(torch.uint8) if stored.dtype == torch.float8_e8m0fnu else stored


def _quantize_nvfp4(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    stored = nvfp4.quantize_weight(weight, name=name)
    return {
        "weight_packed": stored.packed,
        "weight_block_scale": stored.block_scale,
        "weight_tensor_scale": stored.tensor_scale,
    }


def _dequantize_nvfp4(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = nvfp4.dequantize(
        buffers["weight_packed"], buffers["weight_block_scale"], buffers["weight_tensor_scale"]
    )
    return values


def _quantize_mxfp4(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    stored = mxfp4.quantize_weight(weight, name=name)
    return {"weight_packed": stored.packed, "weight_block_scale": as_bytes(stored.block_scale)}


def _dequantize_mxfp4(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = mxfp4.dequantize(buffers["weight_packed"], buffers["weight_block_scale"])
    return values


def _quantize_mxfp8(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    stored = mxfp8.quantize_weight(weight, name=name)
    return {"weight_quantized": stored.codes, "weight_block_scale": as_bytes(stored.block_scale)}


def _dequantize_mxfp8(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = mxfp8.dequantize(
        buffers["weight_quantized"], buffers["weight_block_scale"]
    )
    return values


def _quantize_int4(weight: torch.Tensor, name: str, *, group_size: int) -> dict[str, torch.Tensor]:
    stored = int4.quantize_weight(weight, group_size=group_size, name=name)
    return {"weight_packed": stored.packed, "weight_scale": stored.scale}


def _dequantize_int4(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = int4.dequantize(buffers["weight_packed"], buffers["weight_scale"])
    return values


def _quantize_fp8(weight: torch.Tensor, name: str, *, per_channel: bool) -> dict[str, torch.Tensor]:
    stored = fp8.quantize_weight(weight, per_channel=per_channel, name=name)
    return {"weight_quantized": stored.codes, "weight_scale": stored.scale}


def _dequantize_fp8(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = fp8.dequantize(buffers["weight_quantized"], buffers["weight_scale"])
    return values


def _quantize_int8(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    stored = int8.quantize_weight(weight, name=name)
    return {"weight_quantized": stored.codes, "weight_scale": stored.scale}


def _dequantize_int8(buffers: Buffers) -> torch.Tensor:
    values: torch.Tensor = int8.dequantize(buffers["weight_quantized"], buffers["weight_scale"], 0)
    return values


def _round_nvfp4(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    rounded: torch.Tensor = nvfp4.quantize_dequantize(x, scale)
    return rounded


def _round_fp8(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    rounded: torch.Tensor = fp8.quantize_dequantize(x, scale)
    return rounded


def _round_int8(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    rounded: torch.Tensor = int8.quantize_dequantize(x, scale, 0)
    return rounded


def _round_by_itself(
    x: torch.Tensor, _scale: torch.Tensor | None, *, operator: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """With scales that are taken from `x`."""
    return operator(x)


def _leave(x: torch.Tensor, _scale: torch.Tensor | None) -> torch.Tensor:
    return x


CODECS: dict[str, Codec] = {
    "nvfp4": Codec(
        quantize=_quantize_nvfp4, dequantize=_dequantize_nvfp4,
        input_scale=nvfp4.input_scale, round_input=_round_nvfp4,
    ),
    "mxfp4": Codec(
        quantize=_quantize_mxfp4, dequantize=_dequantize_mxfp4, input_scale=None,
        round_input=partial(_round_by_itself, operator=mxfp4.quantize_dequantize),
    ),
    "mxfp8": Codec(
        quantize=_quantize_mxfp8, dequantize=_dequantize_mxfp8, input_scale=None,
        round_input=partial(_round_by_itself, operator=mxfp8.quantize_dequantize),
    ),
    "fp8": Codec(
        quantize=partial(_quantize_fp8, per_channel=False), dequantize=_dequantize_fp8,
        input_scale=fp8.input_scale, round_input=_round_fp8,
    ),
    "fp8_channel": Codec(
        quantize=partial(_quantize_fp8, per_channel=True), dequantize=_dequantize_fp8,
        input_scale=None,
        round_input=partial(_round_by_itself, operator=fp8.quantize_dequantize_per_token),
    ),
    "int8": Codec(
        quantize=_quantize_int8, dequantize=_dequantize_int8,
        input_scale=int8.input_scale, round_input=_round_int8,
    ),
    "int8_token": Codec(
        quantize=_quantize_int8, dequantize=_dequantize_int8, input_scale=None,
        round_input=partial(_round_by_itself, operator=int8.quantize_dequantize_per_token),
    ),
    **{
        f"int4_g{group_size}": Codec(
            quantize=partial(_quantize_int4, group_size=group_size), dequantize=_dequantize_int4,
            input_scale=None, round_input=_leave,
        )
        for group_size in int4.GROUP_SIZES
    },
}  # fmt: skip


def check_stored(buffers: Buffers, format: str, shape: tuple[int, ...], name: str) -> None:
    """Raise `InputError` unless `buffers` are a weight of `shape` as `format` stores it.

    Args:
        buffers: of the stored weight, by name.
        format: a key of `CODECS`.
        shape: of the weight, output channels first.
        name: what the error calls the weight.
    """
    expected = CODECS[format].quantize(torch.zeros(shape), name)
    if _described(buffers) != _described(expected):
        message = (
            f"{name}: the stored weight has {_described(buffers)}, {format} stores this layer as "
            f"{_described(expected)}; delete the word weight from the layer's tensors, and the "
            "weight is rounded anew"
        )
        raise InputError(message)


def _described(buffers: Buffers) -> str:
    return ", ".join(
        f"{name} {str(buffers[name].dtype).removeprefix('torch.')} {list(buffers[name].shape)}"
        for name in sorted(buffers)
    )
