"""Values worked out by hand, and float32 to the bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from vcompress.calib.preprocess import gray_from_rgb, to_frames, to_model_input
from vcompress.spec.clip import ClipSpec, Layout
from vcompress.spec.errors import InputError

FRAMES = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def test_rescale_mean_and_std_in_this_order() -> None:
    spec = ClipSpec(
        num_frames=2, height=3, width=4, layout="NTHWC",
        rescale=0.5, mean=(1.0, 2.0, 3.0), std=(0.25, 0.5, 2.0),
    )  # fmt: skip
    values = to_model_input(FRAMES, spec)
    assert values.dtype == np.float32
    # The second pixel is (3, 4, 5): (1.5 - 1) / 0.25, (2 - 2) / 0.5, (2.5 - 3) / 2.
    assert values[0, 0, 1].tolist() == [2.0, 0.0, -0.25]
    # The last one is (69, 70, 71): (34.5 - 1) / 0.25, (35 - 2) / 0.5, (35.5 - 3) / 2.
    assert values[1, 2, 3].tolist() == [134.0, 66.0, 16.25]


@pytest.mark.parametrize("layout", ["NTCHW", "NCTHW", "NTHWC"])
def test_frames_come_back_to_the_last_bit(layout: Layout) -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    spec = ClipSpec(
        num_frames=2, height=8, width=16, layout=layout,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    assert np.array_equal(to_frames(to_model_input(every, spec), spec), every)
    plain = ClipSpec(num_frames=2, height=8, width=16, layout=layout, dtype="uint8", rescale=1.0)
    assert np.array_equal(to_frames(to_model_input(every, plain), plain), every)


def test_default_is_zero_to_one() -> None:
    spec = ClipSpec(num_frames=1, height=1, width=2, channels=1, layout="NTHWC")
    values = to_model_input(np.array([[[[0], [255]]]], np.uint8), spec)
    # The float32 nearest to 1 / 255 times 255 is 1.00000006, which rounds to 1.
    assert values.ravel().tolist() == [0.0, 1.0]


def test_each_step_is_one_float32_operation() -> None:
    spec = ClipSpec(
        num_frames=2, height=3, width=4, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    values = to_model_input(FRAMES, spec)
    for frame, row, column, channel in np.ndindex(FRAMES.shape):
        value = np.float32(FRAMES[frame, row, column, channel]) * np.float32(1 / 255)
        value = (value - np.float32(spec.mean[channel])) / np.float32(spec.std[channel])
        assert values[frame, channel, row, column] == value


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("NTCHW", (2, 3, 3, 4)), ("NCTHW", (3, 2, 3, 4)), ("NTHWC", (2, 3, 4, 3))],
)
def test_layouts(layout: Layout, shape: tuple[int, ...]) -> None:
    spec = ClipSpec(num_frames=2, height=3, width=4, layout=layout, rescale=1.0)
    values = to_model_input(FRAMES, spec)
    assert values.shape == shape == spec.input_shape
    assert values.flags.c_contiguous
    position = dict(zip("THWC", (1, 2, 3, 0), strict=True))
    # Frame 1, row 2, column 3, channel 0 is element 1 * 36 + 2 * 12 + 3 * 3 + 0 = 69.
    assert values[tuple(position[axis] for axis in layout[1:])] == 69.0


def test_uint8_is_only_reordered() -> None:
    spec = ClipSpec(num_frames=2, height=3, width=4, dtype="uint8", rescale=1.0)
    values = to_model_input(FRAMES, spec)
    assert values.dtype == np.uint8
    assert np.array_equal(values, FRAMES.transpose(0, 3, 1, 2))


def test_uint8_cannot_be_normalised() -> None:
    spec = ClipSpec(num_frames=2, height=3, width=4, dtype="uint8")
    with pytest.raises(InputError, match="rescale must be 1"):
        to_model_input(FRAMES, spec)


@pytest.mark.parametrize("frames", [FRAMES.astype(np.float32), FRAMES[:1], FRAMES[..., :1]])
def test_other_frames_are_refused(frames: np.ndarray) -> None:
    spec = ClipSpec(num_frames=2, height=3, width=4)
    with pytest.raises(InputError, match=r"\(2, 3, 4, 3\), got"):
        to_model_input(frames, spec)


def test_gray_is_bt601_luma() -> None:
    colors = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [1, 2, 3], [0, 0, 0]], np.uint8
    )
    # 0.299 * 255 = 76.2, 0.587 * 255 = 149.7, 0.114 * 255 = 29.1, 0.299 + 1.174 + 0.342 = 1.8
    assert gray_from_rgb(colors[None, None]).ravel().tolist() == [76, 150, 29, 255, 2, 0]


def test_gray_keeps_gray() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    assert np.array_equal(gray_from_rgb(levels)[..., 0], levels[..., 0])


def test_an_edge_device_needs_no_torch() -> None:
    code = (
        "import sys, vcompress.calib.preprocess, vcompress.calib.sampling;"
        "sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
