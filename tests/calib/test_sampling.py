"""Which frames and which size; every expected number is worked out by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcompress.calib.sampling import centered_indices, crop_origin, resized_size, sample_indices
from vcompress.spec.clip import ClipSpec


def spec(**fields: Any) -> ClipSpec:
    return ClipSpec(**{"num_frames": 4, "height": 224, "width": 224, **fields})


@pytest.mark.parametrize(
    ("count", "num_frames", "stride", "expected"),
    [
        (10, 4, 1, (3, 4, 5, 6)),  # (10 - 4) / 2 = 3 frames on either side
        (10, 4, 2, (1, 3, 5, 7)),  # span 7: 1 in front, 2 behind
        (7, 4, 2, (0, 2, 4, 6)),  # the span fits exactly
        (6, 4, 2, (0, 2, 4, 5)),  # too short by one: the last frame stands in
        (10, 4, 4, (0, 4, 8, 9)),
        (1, 3, 5, (0, 0, 0)),
        (300, 16, 4, tuple(range(119, 119 + 64, 4))),  # span 61: (300 - 61) // 2 = 119
    ],
)
def test_centered_indices(
    count: int, num_frames: int, stride: int, expected: tuple[int, ...]
) -> None:
    assert centered_indices(count, num_frames, stride) == expected


def evenly(count: int, rate: int) -> list[Fraction]:
    return [Fraction(index, rate) for index in range(count)]


def test_half_the_rate_takes_every_second_frame() -> None:
    # 40 frames at 25 are 1.6 s, so 20 frames at 12.5; of these 8..11.
    indices = sample_indices(evenly(40, 25), Fraction(1, 25), spec(fps=12.5))
    assert indices == (16, 18, 20, 22)


def test_twice_the_rate_shows_each_frame_twice() -> None:
    indices = sample_indices(evenly(4, 25), Fraction(1, 25), spec(fps=50.0, num_frames=8))
    assert indices == (0, 0, 1, 1, 2, 2, 3, 3)


def test_a_frame_stays_on_screen_until_the_next_one() -> None:
    times = [Fraction(0), Fraction(1), Fraction(11, 10)]
    indices = sample_indices(times, Fraction(1, 10), spec(fps=10.0, num_frames=12))
    assert indices == (0,) * 10 + (1, 2)


def test_timestamps_rounded_to_milliseconds_lose_no_frame() -> None:
    times = [Fraction(round(1000 * index / 30), 1000) for index in range(60)]
    indices = sample_indices(times, Fraction(1, 30), spec(fps=30.0, num_frames=60))
    assert indices == tuple(range(60))


def test_the_clock_starts_at_the_first_frame() -> None:
    shifted = [5 + time for time in evenly(40, 25)]
    expected = sample_indices(evenly(40, 25), Fraction(1, 25), spec(fps=12.5))
    assert sample_indices(shifted, Fraction(1, 25), spec(fps=12.5)) == expected


def test_broadcast_rates_are_read_as_the_fractions_that_they_are() -> None:
    times = [Fraction(1001 * index, 30000) for index in range(3000)]
    indices = sample_indices(times, Fraction(1001, 30000), spec(fps=30000 / 1001, num_frames=3000))
    assert indices == tuple(range(3000))


@pytest.mark.parametrize(
    ("height", "width", "fields", "expected"),
    [
        (720, 1280, {}, (224, 398)),  # 1280 * 224 / 720 = 398.2
        (1280, 720, {}, (398, 224)),
        (224, 224, {}, (224, 224)),
        (112, 112, {}, (224, 224)),
        (2, 5, {"height": 3, "width": 3}, (3, 8)),  # 7.5 is rounded up
        (100, 100, {"height": 32, "width": 64}, (64, 64)),
        (720, 1280, {"resize": "exact"}, (224, 224)),
    ],
)
def test_resized_size(
    height: int, width: int, fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, spec(**fields)) == expected


@given(*[st.integers(1, 5000)] * 4)
def test_a_cover_never_falls_short_and_keeps_the_aspect(
    height: int, width: int, crop_height: int, crop_width: int
) -> None:
    to = spec(height=crop_height, width=crop_width)
    resized_height, resized_width = resized_size(height, width, to)
    assert resized_height >= crop_height
    assert resized_width >= crop_width
    assert crop_height == resized_height or crop_width == resized_width
    # Half a pixel of rounding on the longer side.
    assert abs(resized_height * width - resized_width * height) <= max(height, width) / 2
    assert min(crop_origin(resized_height, resized_width, to)) >= 0


def test_the_crop_is_in_the_middle() -> None:
    assert crop_origin(224, 398, spec()) == (0, 87)
    assert crop_origin(225, 224, spec()) == (0, 0)
