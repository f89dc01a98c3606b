"""How a video becomes a model's input: sampling, geometry, normalisation.

The same object drives calibration, validation and the edge device: it stands in full in the
manifest of an artifact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vcompress.spec.errors import InputError

__all__ = ["ClipSpec", "Layout"]

Layout = Literal["NTCHW", "NCTHW", "NTHWC"]
_WORDS = {
    "layout": ("NTCHW", "NCTHW", "NTHWC"),
    "resize": ("cover", "exact"),
    "sampling": ("center",),
    "short_video": ("repeat_last",),
    "dtype": ("float32", "uint8"),
}


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """From a decoded video (frames `[T, H, W, 3]`, uint8 RGB) to one model input.

    Steps, in this order: sample `num_frames` frames `stride` apart (at `fps` if given, else at
    the video's own rate), resize so that the shorter edge covers the crop, crop the centre to
    `height` x `width`, convert to gray if `channels` is 1, multiply by `rescale`, subtract `mean`
    and divide by `std` per channel, order the axes as `layout`.

    Attributes:
        resize: "cover" keeps the aspect ratio and crops; "exact" stretches to the size.
        sampling: "center" takes the middle of the video.
        short_video: what stands in for missing frames; "repeat_last" repeats the last frame.
        dtype: "float32" or "uint8" (then rescale, mean and std must be neutral).
    """

    num_frames: int
    height: int
    width: int
    channels: int = 3
    stride: int = 1
    fps: float | None = None
    resize: Literal["cover", "exact"] = "cover"
    sampling: Literal["center"] = "center"
    short_video: Literal["repeat_last"] = "repeat_last"
    rescale: float = 1 / 255
    mean: tuple[float, ...] = field(default=(0.0,))
    std: tuple[float, ...] = field(default=(1.0,))
    layout: Layout = "NTCHW"
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                message = f"clip.{name} must be an integer of at least 1, got {value!r}"
                raise InputError(message)
        if self.fps is not None and not 0 < self.fps < math.inf:
            message = f"clip.fps must be above 0, got {self.fps}; leave it out for the video's own"
            raise InputError(message)
        if self.channels not in (1, 3):
            message = f"clip.channels must be 1 (gray) or 3 (RGB), got {self.channels}"
            raise InputError(message)
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                message = (
                    f"clip.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
                raise InputError(message)
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                allowed = "1 value" if self.channels == 1 else f"1 or {self.channels} values"
                message = f"clip.{name} must have {allowed}, got {len(getattr(self, name))}"
                raise InputError(message)
        if not all(0 < value < math.inf for value in self.std):
            message = f"clip.std must be positive, got {self.std}"
            raise InputError(message)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input without the batch axis, in the order of `layout`."""
        sizes = {
            "T": self.num_frames, "C": self.channels, "H": self.height, "W": self.width,
        }  # fmt: skip
        return tuple(sizes[axis] for axis in self.layout[1:])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for manifest and plan."""
        return {
            "num_frames": self.num_frames, "stride": self.stride, "fps": self.fps,
            "sampling": self.sampling, "short_video": self.short_video,
            "height": self.height, "width": self.width, "channels": self.channels,
            "resize": self.resize, "interpolation": "bilinear",
            "color": "GRAY" if self.channels == 1 else "RGB",
            "rescale": self.rescale, "mean": list(self.mean), "std": list(self.std),
            "layout": self.layout, "dtype": self.dtype,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClipSpec:
        """The inverse of `as_dict`."""
        fields = {
            key: value for key, value in data.items() if key not in ("interpolation", "color")
        }
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            message = f"unknown keys in clip: {', '.join(sorted(unknown))}"
            raise InputError(message)
        try:
            for name in ("mean", "std"):
                if name in fields:
                    fields[name] = tuple(fields[name])
            return cls(**fields)
        except TypeError as error:
            message = f"clip has a wrong or missing value: {error}"
            raise InputError(message) from error
