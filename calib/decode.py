"""Decoding videos. The only importer of PyAV.

A video file is hostile input to a large C library, so the library is given little choice: the
container is recognised from the first bytes and named explicitly, playlists are not among the
containers, decoders come from an allow-list, and the absolute path is passed as a plain file, so
that no character in a name has a meaning. A second file is never opened.

A video counts as truncated or corrupt, and is refused, when the container cannot be opened or
read, a packet was cut off, a frame cannot be decoded or is flagged as damaged by the decoder, or
fewer than 90 % of what the container declares (frames in MP4 and AVI, the duration in Matroska
and FLV) is there. The other containers, and MP4 in fragments, declare no length that can be
trusted, so a cut between two packets goes unseen there; and everywhere damage goes unseen that a
decoder conceals without a flag.

Pixels are taken as square. A display rotation by 90, 180 or 270 degrees is applied.

Legend: T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vcompress.calib.preprocess import gray_from_rgb
from vcompress.calib.sampling import crop_origin, resized_size, sample_indices
from vcompress.calib.sniff import printable, sniff_demuxer
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

__all__ = ["check_complete", "naming", "opened", "picture_of", "read_frames"]

_DECODERS = (
    "av1", "dnxhd", "ffv1", "flashsv", "flv", "gif", "h261", "h263", "h264", "hevc", "huffyuv",
    "libdav1d", "libvpx", "libvpx-vp9", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4",
    "msmpeg4", "msmpeg4v2", "png", "prores", "qtrle", "rawvideo", "theora", "utvideo", "vc1",
    "vp6", "vp6f", "vp8", "vp9", "wmv1", "wmv2", "wmv3",
)  # fmt: skip

_MAX_PIXELS = 2**26  # of one frame: 8192 x 8192
_MAX_FRAMES = 100_000  # of one video: almost an hour at 30 frames a second
_MAX_TOTAL_PIXELS = 2**38  # of one video: about 130,000 frames of 1920 x 1080
_IO_TIMEOUT_S = 60.0
_MIN_SHARE = Fraction(9, 10)
_MIN_DECODED_SHARE = Fraction(1, 2)  # the two fields of a frame may come in two packets


def read_frames(path: Path, spec: ClipSpec) -> npt.NDArray[np.uint8]:
    """The frames of a video that `spec` asks for, `[T, H, W, C]` uint8, RGB or gray.

    Frames are sampled, resized (bilinear, antialiased when made smaller), cropped and, for one
    channel, converted to gray by BT.601 luma.

    Raises:
        InputError: not a video, no frames, truncated, corrupt, or larger than the caps; the
            message is `path: reason`.
        MissingCapabilityError: PyAV is not installed.
    """
    with naming(path):
        demuxer = sniff_demuxer(path)
        with opened(path, demuxer) as (container, stream):
            times, frame_duration = _survey(container, stream)
        guess = sample_indices(times, frame_duration, spec)
        pictures, wanted = _decode(path, demuxer, guess, len(times), spec)
        if wanted != guess:  # some packets hold no whole frame; the decoded frames count
            pictures, wanted = _decode(path, demuxer, wanted, len(times), spec)
        frames = np.stack([pictures[index] for index in wanted])
    return gray_from_rgb(frames) if spec.channels == 1 else frames


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn everything that PyAV and the file system can raise into `InputError: path: reason`."""
    try:
        import av
    except ImportError as error:
        message = "reading videos needs PyAV, which is not installed; run: pip install 'av>=18'"
        raise MissingCapabilityError(message) from error
    try:
        yield
    except InputError as error:
        message = f"{printable(path)}: {error}"
        raise InputError(message) from error
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        message = f"{printable(path)}: truncated or corrupt video ({reason}); encode it again"
        raise InputError(message) from error
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:
        # PyAV raises any of these where a damaged header contradicts itself.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"{printable(path)}: cannot be read ({printable(reason)})"
        raise InputError(message) from error


@contextmanager
def opened(path: Path, demuxer: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file with exactly this demuxer and find its video stream."""
    import av

    limits = {"codec_whitelist": ",".join(_DECODERS), "max_pixels": str(_MAX_PIXELS)}
    options = {**limits, "protocol_whitelist": "file", "format_whitelist": demuxer}
    with av.open(
        f"file:{path.absolute()}", format=demuxer, options=options, timeout=_IO_TIMEOUT_S
    ) as container:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            message = "the file has no video stream"
            raise InputError(message)
        context = streams[0].codec_context
        name = None if context is None else context.name
        if name not in _DECODERS:
            message = f"the codec {name or 'of the video'} is not supported; encode it as H.264"
            raise InputError(message)
        _check_pixels(context.height, context.width)
        context.options = limits
        yield container, streams[0]


def _survey(container: InputContainer, stream: VideoStream) -> tuple[list[Fraction], Fraction]:
    """When each frame appears, from the packets alone: nothing is decoded yet."""
    stamps: list[int | None] = []
    num_packets = 0
    for packet in container.demux(stream):
        if packet.size == 0 and packet.dts is None:  # the flush packet behind the last one
            continue
        num_packets += 1
        if packet.is_corrupt:
            message = f"truncated or corrupt video: packet {num_packets} is incomplete"
            raise InputError(message)
        if packet.size and not packet.is_discard:
            stamps.append(packet.pts)
        _check_length(num_packets, stream)
    if not stamps:
        message = "the video has no frames"
        raise InputError(message)
    known = sorted(stamp for stamp in stamps if stamp is not None)
    times, frame_duration = _times(known if len(known) == len(stamps) else stamps, stream)
    check_complete(container, stream, num_packets, times[-1] + frame_duration)
    return times, frame_duration


def _times(stamps: Sequence[int | None], stream: VideoStream) -> tuple[list[Fraction], Fraction]:
    """Seconds at which frames appear, and how long the last one stays.

    Where stamps are missing or do not increase, frames are taken as evenly spaced.
    """
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    known = [stamp for stamp in stamps if stamp is not None]
    increasing = all(earlier < later for earlier, later in pairwise(known))
    if stream.time_base is None or len(known) < len(stamps) or not increasing:
        return [index / rate for index in range(len(stamps))], 1 / rate
    return [stamp * stream.time_base for stamp in known], 1 / rate


def check_complete(
    container: InputContainer, stream: VideoStream, num_packets: int, end_s: Fraction
) -> None:
    """Compare what is there with what the container declares, where it declares something."""
    # MP4's own count includes frames that an edit list hides, of which some never come; the index
    # holds what comes. An AVI that was cut has no index.
    kind = container.format.name
    declared = len(stream.index_entries) if "mov" in kind else stream.frames if kind == "avi" else 0
    if num_packets < _MIN_SHARE * declared:
        message = f"truncated video: {num_packets} of {declared} declared frames are there"
        raise InputError(message)
    declared_s = _seconds(stream.metadata.get("DURATION", ""))
    if kind == "flv" and len(container.streams) == 1 and container.duration:
        declared_s = Fraction(container.duration, 1_000_000)
    if declared_s is not None and end_s < _MIN_SHARE * declared_s:
        message = f"truncated video: {float(end_s):.2f} of {float(declared_s):.2f} s are there"
        raise InputError(message)


def _seconds(clock: str) -> Fraction | None:
    """Matroska's `hours:minutes:seconds`, or None where it is absent or malformed."""
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    except (ValueError, ZeroDivisionError):
        return None


def _decode(
    path: Path, demuxer: str, wanted: Sequence[int], num_packets: int, spec: ClipSpec
) -> tuple[dict[int, npt.NDArray[np.uint8]], tuple[int, ...]]:
    """Decode the whole video; keep the frames in `wanted`, `[H, W, 3]` each.

    Also returns the indices that `spec` asks for, now that the number of frames is certain.
    """
    from av.video.reformatter import VideoReformatter

    keep = frozenset(wanted)
    pictures: dict[int, npt.NDArray[np.uint8]] = {}
    stamps: list[int | None] = []
    reformatter = VideoReformatter()
    with opened(path, demuxer) as (container, stream):
        for frame in container.decode(stream):
            index = len(stamps)
            if frame.is_corrupt:
                message = f"truncated or corrupt video: frame {index} is damaged"
                raise InputError(message)
            if index in keep:
                pictures[index] = picture_of(frame, reformatter, spec)
            stamps.append(frame.pts)
            _check_length(len(stamps), stream)
        if not stamps or len(stamps) < _MIN_DECODED_SHARE * num_packets:
            message = f"corrupt video: {len(stamps)} frames came out of {num_packets} packets"
            raise InputError(message)
        times, frame_duration = _times(stamps, stream)
    return pictures, sample_indices(times, frame_duration, spec)


def picture_of(
    frame: VideoFrame, reformatter: VideoReformatter, spec: ClipSpec
) -> npt.NDArray[np.uint8]:
    """One frame upright, resized and cropped: `[H, W, 3]` RGB."""
    from av.video.reformatter import Interpolation

    # Flags beyond bilinear make the result the same on every processor.
    flags = (
        Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        | Interpolation.FULL_CHR_H_INT
    )  # fmt: skip
    quarter_turns = round(frame.rotation / 90) % 4
    sideways = quarter_turns % 2 == 1
    _check_pixels(frame.height, frame.width)
    height, width = (frame.width, frame.height) if sideways else (frame.height, frame.width)
    height, width = resized_size(height, width, spec)
    _check_pixels(height, width)
    resized: npt.NDArray[Any] = reformatter.reformat(
        frame,
        width=height if sideways else width,
        height=width if sideways else height,
        format="rgb24",
        interpolation=flags,
        threads=1,
    ).to_ndarray()
    upright = np.rot90(resized, quarter_turns)
    top, left = crop_origin(height, width, spec)
    return np.ascontiguousarray(upright[top : top + spec.height, left : left + spec.width])


def _check_pixels(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        message = f"a frame may have at most {_MAX_PIXELS} pixels, got {width} x {height}"
        raise InputError(message)


def _check_length(num_frames: int, stream: VideoStream) -> None:
    pixels = stream.codec_context.width * stream.codec_context.height
    if num_frames > _MAX_FRAMES or num_frames * pixels > _MAX_TOTAL_PIXELS:
        message = (
            f"a video may have at most {_MAX_FRAMES} frames and {_MAX_TOTAL_PIXELS} pixels in "
            "all, this one has more; cut it into clips"
        )
        raise InputError(message)
