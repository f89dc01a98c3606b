"""Frames of a video one after the other, for as long as it runs, in constant memory.

`decode.read_frames` chooses frames after it has seen how long the video is. Here nothing is known
of the end: frames come as they are decoded, and nothing of them is kept. They are the same pixels,
at the rate and stride that the clip specification asks for, without its centring.

What is damaged is refused where it comes: frames before it have been handed out by then. As in
`decode`, a container that declares more frames than there are is refused too, at the end.

Legend: H W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vcompress.calib.decode import check_complete, naming, opened, picture_of
from vcompress.calib.preprocess import gray_from_rgb
from vcompress.calib.sampling import TOLERANCE_S
from vcompress.calib.sniff import sniff_demuxer
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["TimedFrame", "fitted_frames", "live_frames"]

TimedFrame = tuple[float, npt.NDArray[np.uint8]]
"""Seconds since the first frame, and a frame `[H, W, C]` uint8 of the model's size."""


def live_frames(path: Path, spec: ClipSpec) -> Iterator[TimedFrame]:
    """The frames of a video in order, every `spec.stride`-th at `spec.fps`.

    Raises:
        InputError: not a video, no frames, truncated or corrupt; the message is `path: reason`.
        MissingCapabilityError: PyAV is not installed.
    """
    return islice(_frames(path, spec), 0, None, spec.stride)


def _frames(path: Path, spec: ClipSpec) -> Iterator[TimedFrame]:
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    with naming(path):
        demuxer = sniff_demuxer(path)
        with opened(path, demuxer) as (container, stream):
            duration = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
            timed = _timed(container, stream, duration)
            for seconds, frame in _resampled(timed, duration, spec.fps):
                picture = picture_of(frame, reformatter, spec)
                yield float(seconds), gray_from_rgb(picture) if spec.channels == 1 else picture


def _timed(
    container: InputContainer, stream: VideoStream, duration: Fraction
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames with the seconds since the first; a stamp that is missing or late is made up."""
    num_packets, num_frames = 0, 0
    first, previous = Fraction(0), -duration
    for packet in container.demux(stream):
        flush = packet.size == 0 and packet.dts is None
        num_packets += not flush
        if packet.is_corrupt and not flush:
            message = f"truncated or corrupt video: packet {num_packets} is incomplete"
            raise InputError(message)
        for frame in packet.decode():
            if frame.is_corrupt:
                message = f"truncated or corrupt video: frame {num_frames} is damaged"
                raise InputError(message)
            seconds = previous + duration
            if frame.pts is not None and stream.time_base is not None:
                stamp = frame.pts * stream.time_base
                first = first if num_frames else stamp
                seconds = stamp - first if stamp - first > previous else seconds
            previous = seconds
            num_frames += 1
            yield seconds, frame
    if not num_frames:
        message = "the video has no frames"
        raise InputError(message)
    check_complete(container, stream, num_packets, first + previous + duration)


def _resampled(
    timed: Iterator[tuple[Fraction, VideoFrame]], duration: Fraction, rate: float | None
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """At `rate` frames a second: frame k is the one on screen after k / rate seconds."""
    if rate is None:
        yield from timed
        return
    step = 1 / Fraction(rate).limit_denominator(1001)
    held: VideoFrame | None = None
    seconds, number = Fraction(0), 0
    for seconds, frame in timed:
        while held is not None and number * step + TOLERANCE_S < seconds:
            yield number * step, held
            number += 1
        held = frame
    # The last frame stays for its duration.
    while held is not None and (number + 1) * step <= seconds + duration + TOLERANCE_S:
        yield number * step, held
        number += 1


def fitted_frames(frames: Iterable[TimedFrame], spec: ClipSpec) -> Iterator[TimedFrame]:
    """Frames `[H, W, 3]` uint8 RGB of any size, made what the model takes.

    They come at the rate at which the model sees them: `spec.fps` and `spec.stride` do not count.

    Raises:
        InputError: a frame has another shape or type.
        MissingCapabilityError: PyAV is not installed.
    """
    reformatter = None
    for number, (seconds, pixels) in enumerate(frames):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            message = (
                f"a frame must be uint8 [H, W, 3] (RGB), got {pixels.dtype} of shape "
                f"{list(pixels.shape)} at place {number}"
            )
            raise InputError(message)
        if pixels.shape[:2] != (spec.height, spec.width):
            with naming(Path(f"frame {number}")):
                from av import VideoFrame
                from av.video.reformatter import VideoReformatter

                reformatter = reformatter or VideoReformatter()
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
                pixels = picture_of(frame, reformatter, spec)
        yield float(seconds), gray_from_rgb(pixels) if spec.channels == 1 else pixels
