"""Real videos whose every frame says its own number: six vertical bars are the bits of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

NUM_BITS = 6
HEIGHT, WIDTH = 48, 96


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> npt.NDArray[np.uint8]:
    """A frame `[H, W, 3]` whose bars are white where the bit of `number` is set."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            frame[:, bit * width // NUM_BITS : (bit + 1) * width // NUM_BITS] = 255
    return frame


@pytest.fixture
def numbers_of() -> Callable[[npt.NDArray[np.uint8]], list[int]]:
    """Reads the numbers back from frames `[T, H, W, C]`."""

    def read(frames: npt.NDArray[np.uint8]) -> list[int]:
        _, height, width, _ = frames.shape
        centers = [bit * width // NUM_BITS + width // NUM_BITS // 2 for bit in range(NUM_BITS)]
        bits = frames[:, height // 2, centers].mean(axis=-1) > 128
        return [sum(int(bit) << place for place, bit in enumerate(row)) for row in bits]

    return read


@pytest.fixture
def make_video() -> Callable[..., Path]:
    """Writes a video of numbered frames, or of given ones, and returns its path."""

    def make(
        path: Path,
        *,
        num_frames: int = 40,
        frames: Sequence[npt.NDArray[np.uint8]] | None = None,
        codec: str = "libx264",
        pixel_format: str = "yuv420p",
        container: str | None = None,
        rate: int = 25,
        stamps: Sequence[int] | None = None,
        rotation: int | None = None,
        options: dict[str, str] | None = None,
        movflags: str | None = None,
    ) -> Path:
        pictures = frames or [numbered(number) for number in range(num_frames)]
        muxer_options = {} if movflags is None else {"movflags": movflags}
        with av.open(str(path), "w", format=container, container_options=muxer_options) as output:
            stream: Any = output.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = pixel_format
            stream.codec_context.gop_size = 12
            if rotation is not None:
                stream.set_display_rotation(rotation)
            for index, picture in enumerate(pictures):
                kind = {1: "gray", 3: "rgb24", 4: "rgba"}[picture.shape[2]]
                content = picture[..., 0] if kind == "gray" else picture
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(content), kind)
                frame.pts = index if stamps is None else stamps[index]
                frame.time_base = Fraction(1, rate)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return path

    return make
