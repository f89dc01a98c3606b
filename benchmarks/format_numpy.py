"""The number formats once more, in numpy with the casts of ml_dtypes, from their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from vcompress.benchmarks.format_stored import INT4_GROUPS, Stored

__all__ = ["quantizer"]

Floats = NDArray[np.float32]
_SMALLEST_SCALE = np.float32(2.0**-100)


def quantizer(format: str) -> Callable[[torch.Tensor], Stored]:
    """The function that quantizes weights `[N, K]`, float32 or bfloat16, to `format`."""

    def quantize(weight: torch.Tensor) -> Stored:
        values = weight.float().numpy()
        if format == "nvfp4":
            return _nvfp4(values)
        if format in ("mxfp4", "mxfp8"):
            return _microscaling(values, four_bits=format == "mxfp4")
        if format in INT4_GROUPS:
            return _int4(values, INT4_GROUPS[format])
        return _eight_bits(values, format)

    return quantize


def _blocks(values: Floats, size: int) -> tuple[Floats, Floats]:
    blocks = values.reshape(len(values), -1, size)
    return blocks, np.abs(blocks).max(-1, keepdims=True)


def _scale(amax: Floats, largest: float) -> Floats:
    scale = np.maximum(amax / np.float32(largest), _SMALLEST_SCALE)
    return np.where(amax == 0, np.float32(1), scale)


def _stored(elements: NDArray[Any], scales: NDArray[Any], shape: tuple[int, ...]) -> Stored:
    return Stored(
        torch.from_numpy(elements.astype(np.float32).reshape(shape)),
        torch.from_numpy(scales.astype(np.float32).reshape(-1, scales.size // len(scales))),
    )


def _nvfp4(values: Floats) -> Stored:
    tensor_scale = _scale(np.abs(values).max(), 6 * 448)
    blocks, amax = _blocks(values, 16)
    scale = amax / (np.float32(6) * tensor_scale)
    scale = np.where(scale == 0, np.float32(1), scale).clip(2.0**-9, 448)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elements = (blocks / (scale * tensor_scale)).astype(ml_dtypes.float4_e2m1fn)
    stored = _stored(elements, scale[..., 0], values.shape)
    return Stored(stored.elements, stored.scales, torch.tensor(tensor_scale))


def _microscaling(values: Floats, *, four_bits: bool) -> Stored:
    largest = 6.0 if four_bits else 448.0
    blocks, amax = _blocks(values, 32)
    # The smallest exponent with amax <= largest * 2^exponent; exact in float64.
    exponent = np.frexp(amax)[1] - np.frexp(largest)[1]
    exponent = exponent + (np.ldexp(largest, exponent) < amax)
    exponent = np.where(amax == 0, 0, np.maximum(exponent, -100))
    scale = np.ldexp(np.float32(1), exponent)
    element = ml_dtypes.float4_e2m1fn if four_bits else ml_dtypes.float8_e4m3fn
    encoded = scale.astype(ml_dtypes.float8_e8m0fnu)
    return _stored((blocks / scale).astype(element), encoded[..., 0], values.shape)


def _eight_bits(values: Floats, format: str) -> Stored:
    amax = np.abs(values).max(-1, keepdims=True)
    if format == "fp8":
        amax = amax.max(keepdims=True)
    if format == "int8":
        scale = _scale(amax, 127)
        return _stored(
            (values / scale).round().clip(-128, 127).astype(np.int8), scale, values.shape
        )
    scale = _scale(amax, 448)
    elements = (values / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return _stored(elements, scale, values.shape)


def _int4(values: Floats, group: int) -> Stored:
    groups, amax = _blocks(values, group)
    scale = np.maximum(amax / np.float32(7), np.float32(2.0**-24))
    scale = np.where(amax == 0, np.float32(1), scale).astype(np.float16)
    codes = (groups / scale.astype(np.float32)).round().clip(-8, 7).astype(ml_dtypes.int4)
    return _stored(codes, scale[..., 0], values.shape)
