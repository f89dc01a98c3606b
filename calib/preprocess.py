"""From sampled uint8 frames to one model input, with numpy alone.

The same code runs on an edge device, so nothing else is imported. Every step is one elementwise
float32 operation in a fixed order, so that the result is the same to the bit on every machine.

Legend: T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["gray_from_rgb", "to_frames", "to_model_input"]

# ITU-R BT.601 luma, as 16-bit fixed point: the three add up to 65536.
_LUMA = (19595, 38470, 7471)


def gray_from_rgb(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGB frames `[..., H, W, 3]` as gray `[..., H, W, 1]`, by BT.601 luma, halves rounded up."""
    total = np.full(frames.shape[:-1], 1 << 15, np.uint32)
    for channel, weight in enumerate(_LUMA):
        total += frames[..., channel].astype(np.uint32) * np.uint32(weight)
    return (total >> 16).astype(np.uint8)[..., None]


def to_model_input(frames: npt.NDArray[np.uint8], spec: ClipSpec) -> npt.NDArray[Any]:
    """One model input of `spec.input_shape`, without a batch axis.

    `(frames * rescale - mean) / std` in float32, then the axes in the order of `spec.layout`;
    for `spec.dtype` "uint8" only the axes are reordered.

    Args:
        frames: `[T, H, W, C]` uint8, already of the size, count and channels of `spec`.
        spec: the clip specification.

    Raises:
        InputError: the frames have another shape or dtype, or `spec` asks for a normalisation
            of uint8 values.
    """
    expected = (spec.num_frames, spec.height, spec.width, spec.channels)
    if frames.dtype != np.uint8 or frames.shape != expected:
        message = (
            f"frames must be uint8 of shape {expected}, got {frames.dtype} of shape "
            f"{frames.shape}; sample, resize and convert them first"
        )
        raise InputError(message)
    order = tuple("THWC".index(axis) for axis in spec.layout[1:])
    if spec.dtype == "uint8":
        _check_neutral(spec)
        return np.ascontiguousarray(frames.transpose(order))
    values = frames.astype(np.float32)
    values *= np.float32(spec.rescale)
    values -= np.asarray(spec.mean, np.float32)
    values /= np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(values.transpose(order))


def to_frames(values: npt.NDArray[Any], spec: ClipSpec) -> npt.NDArray[np.uint8]:
    """The inverse of `to_model_input`: frames `[T, H, W, C]` as a person can look at them.

    Args:
        values: `spec.input_shape`; what lies outside of 0..255 afterwards is cut off.
    """
    frames = values.transpose([spec.layout[1:].index(axis) for axis in "THWC"])
    pixels = frames * np.asarray(spec.std, np.float32) + np.asarray(spec.mean, np.float32)
    return np.rint(np.clip(pixels / np.float32(spec.rescale), 0, 255)).astype(np.uint8)


def _check_neutral(spec: ClipSpec) -> None:
    if spec.rescale != 1 or any(spec.mean) or any(value != 1 for value in spec.std):
        message = (
            "a clip of dtype uint8 cannot be normalised: rescale must be 1, mean 0 and std 1, got "
            f"{spec.rescale}, {spec.mean} and {spec.std}; use dtype float32 or neutral values"
        )
        raise InputError(message)
