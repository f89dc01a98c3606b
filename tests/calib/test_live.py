"""Frames one after the other: which, when, and how a damaged video ends."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vcompress.calib.live import fitted_frames, live_frames
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

Numbers = Callable[[npt.NDArray[np.uint8]], list[int]]
Make = Callable[..., Path]


def spec(**fields: Any) -> ClipSpec:
    return ClipSpec(**{"num_frames": 4, "height": 48, "width": 96, **fields})


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4.avi"])
@pytest.mark.parametrize(
    ("fields", "numbers", "step_s"),
    [
        ({}, list(range(40)), 0.04),
        ({"stride": 3}, list(range(0, 40, 3)), 0.12),
        # 40 frames of 1/25 s last 1.6 s: 20 frames at 12.5 a second, 80 at 50.
        ({"fps": 12.5}, list(range(0, 40, 2)), 0.08),
        ({"fps": 50.0}, [index // 2 for index in range(80)], 0.02),
        ({"fps": 50.0, "stride": 4}, list(range(0, 40, 2)), 0.08),
    ],
)
def test_every_frame_in_its_time(
    tmp_path: Path, make_video: Make, numbers_of: Numbers, name: str, fields: dict[str, Any],
    numbers: list[int], step_s: float,
) -> None:  # fmt: skip
    codec = {"codec": "mpeg4"} if "mpeg4" in name else {}
    path = make_video(tmp_path / name, **codec)
    timed = list(live_frames(path, spec(**fields)))
    assert numbers_of(np.stack([frame for _, frame in timed])) == numbers
    assert [seconds for seconds, _ in timed] == pytest.approx(
        [index * step_s for index in range(len(numbers))], abs=2e-3
    )


def test_pixels_are_those_of_a_clip(tmp_path: Path, make_video: Make) -> None:
    from vcompress.calib.decode import read_frames

    path = make_video(tmp_path / "a.mp4", num_frames=12)
    wanted = spec(num_frames=12, height=20, width=24, channels=1)
    frames = np.stack([frame for _, frame in live_frames(path, wanted)])
    assert np.array_equal(frames, read_frames(path, wanted))


@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4"])
def test_a_cut_video_ends_with_one_line(tmp_path: Path, make_video: Make, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 96, 3), np.uint8)
    # The index of the MP4 stands in front, so that it opens.
    movflags = "faststart" if name.endswith("mp4") else None
    path = make_video(tmp_path / name, frames=list(noise), movflags=movflags)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    frames = live_frames(path, spec())
    assert len(list(islice(frames, 8))) == 8
    with pytest.raises(InputError, match=r"cut\..*truncated") as caught:
        list(frames)
    assert "\n" not in str(caught.value)


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello, this is not a video at all")
    with pytest.raises(InputError, match="not a video"):
        next(live_frames(tmp_path / "a.mp4", spec()))
    with pytest.raises(InputError, match=r"b\.mp4: cannot be read"):
        next(live_frames(tmp_path / "b.mp4", spec()))


def test_frames_of_a_camera_are_made_to_fit(numbers_of: Numbers) -> None:
    pixels = np.zeros((96, 192, 3), np.uint8)
    pixels[:, :32] = 255
    ((seconds, frame),) = fitted_frames([(2.5, pixels)], spec())
    assert (seconds, frame.shape, numbers_of(frame[None])) == (2.5, (48, 96, 3), [1])
    ((_, gray),) = fitted_frames([(0, frame)], spec(channels=1))
    assert gray.shape == (48, 96, 1)
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\].*float64.*place 0"):
        next(fitted_frames([(0, np.zeros((48, 96, 3)))], spec()))
