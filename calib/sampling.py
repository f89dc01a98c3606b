"""Which frames of a video a model sees, and the size that they are resized to.

Pure arithmetic on exact numbers, so that calibration, validation and an edge device agree to the
frame. Only the standard library and the clip specification are used.

Legend: T frames of a clip, H W rows and columns in pixels; times in seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from vcompress.spec.clip import ClipSpec

__all__ = ["TOLERANCE_S", "centered_indices", "crop_origin", "resized_size", "sample_indices"]

# Matroska rounds timestamps to a millisecond; without this much slack a frame that starts at
# 0.0667 s would be missed by a request for t = 2/30 s.
TOLERANCE_S = Fraction(1, 1000)


def centered_indices(count: int, num_frames: int, stride: int) -> tuple[int, ...]:
    """`num_frames` indices into `count` frames, `stride` apart, in the middle of the video.

    The span of `(num_frames - 1) * stride + 1` frames is centred, one frame towards the start
    where it cannot be exact. Where the video is shorter than the span, the indices begin at 0
    and the last frame of the video stands in for all that lie behind it.
    """
    span = (num_frames - 1) * stride + 1
    start = max(0, (count - span) // 2)
    return tuple(min(start + step * stride, count - 1) for step in range(num_frames))


def sample_indices(
    times: Sequence[Fraction], frame_duration: Fraction, spec: ClipSpec
) -> tuple[int, ...]:
    """Indices of the frames that `spec` asks for, `[T]`.

    Without `spec.fps` the frames are counted. With it the video is first read as a sequence at
    `spec.fps`: its frame k is the frame on screen k / fps seconds after the first one.

    Args:
        times: when each frame appears, in order; at least one.
        frame_duration: how long the last frame stays, in seconds.
        spec: the clip specification.
    """
    if spec.fps is None:
        return centered_indices(len(times), spec.num_frames, spec.stride)
    fps = Fraction(spec.fps).limit_denominator(1001)
    duration = times[-1] - times[0] + frame_duration
    count = max(1, int((duration + TOLERANCE_S) * fps))
    return tuple(
        bisect_right(times, times[0] + step / fps + TOLERANCE_S) - 1
        for step in centered_indices(count, spec.num_frames, spec.stride)
    )


def resized_size(height: int, width: int, spec: ClipSpec) -> tuple[int, int]:
    """Rows and columns that a frame of `height` x `width` is resized to before the crop.

    "exact" stretches to the size of the model. "cover" keeps the aspect ratio: one side is as
    long as the crop, the other is rounded to the nearest pixel (halves up) and not shorter.
    """
    if spec.resize == "exact":
        return spec.height, spec.width
    if spec.height * width >= spec.width * height:
        rounded = (2 * width * spec.height + height) // (2 * height)
        return spec.height, max(spec.width, rounded)
    rounded = (2 * height * spec.width + width) // (2 * width)
    return max(spec.height, rounded), spec.width


def crop_origin(height: int, width: int, spec: ClipSpec) -> tuple[int, int]:
    """Top row and left column of the centre crop in a resized frame of `height` x `width`."""
    return (height - spec.height) // 2, (width - spec.width) // 2
