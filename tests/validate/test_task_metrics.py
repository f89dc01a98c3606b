"""Confidence, events and motion: by hand, and in the table of a run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vcompress.validate.frames import flicker_percent, motion_error_px
from vcompress.validate.metrics import compare_outputs
from vcompress.validate.task_metrics import (
    average_precision,
    expected_calibration_error,
    video_metrics,
)


def test_calibration_error_by_hand() -> None:
    # Two classes with confidence 0.9, once right, once wrong; one with 0.6, right.
    logits = np.log([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    # The bin of 0.9: |0.9 + 0.9 - 1| = 0.8; that of 0.6: |0.6 - 1| = 0.4; over three clips.
    assert expected_calibration_error(logits, [0, 0, 0]) == pytest.approx(100 * 1.2 / 3)
    assert expected_calibration_error([[1e3, 0.0], [0.0, 1e3]], [0, 1]) == 0.0


def test_average_precision_by_hand() -> None:
    # Events stand at ranks 1 and 3: (1 + 2/3) / 2.
    assert average_precision([4, 3, 2, 1], [True, False, True, False]) == pytest.approx(5 / 6)
    # Equal scores are one threshold: both events are found at a precision of a half.
    assert average_precision([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert average_precision([1.0, 2.0], [False, False]) is None


def test_a_detector_is_judged_by_the_events_of_its_baseline() -> None:
    baseline = np.array([[3.0, -1.0, -2.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    metrics = compare_outputs(baseline, baseline, labels=None, task="detect")
    assert metrics["average_precision_percent"] == 100.0
    assert metrics["num_events"] == metrics["num_baseline_events"] == 2
    candidate = baseline.copy()
    candidate[0, 3], candidate[1, 0] = -0.5, 2.0
    metrics = compare_outputs(baseline, candidate, labels=None, task="detect")
    # Scores in order: 3 (event), 2 (none), -0.5 (event).
    assert metrics["average_precision_percent"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert metrics["moments_agreeing_percent"] == 75.0


def moving(shift: float, num_frames: int = 4) -> np.ndarray:
    """A blob that goes right by `shift` pixels a frame, `[T, H, W, 1]`."""
    y, x = np.mgrid[:32, :32].astype(np.float32)
    frames = [np.exp(-((x - 8 - shift * t) ** 2 + (y - 16) ** 2) / 18) for t in range(num_frames)]
    return np.stack(frames)[..., None].astype(np.float32)


def test_flicker_is_what_changes_over_time() -> None:
    clip = moving(1.0)
    assert flicker_percent(clip, clip + 0.1) == pytest.approx(0.0, abs=1e-4)
    blinking = clip + 0.1 * (np.arange(4) % 2)[:, None, None, None]
    assert flicker_percent(clip, blinking.astype(np.float32)) == pytest.approx(10.0, rel=1e-5)
    assert flicker_percent(clip[:1], clip[:1]) == 0.0


def test_motion_error_is_the_difference_of_speeds() -> None:
    clip = moving(1.0)
    assert motion_error_px(clip, clip) == 0.0
    slower = motion_error_px(clip, moving(0.5))
    assert slower is not None
    assert 0.25 < slower < 0.75
    assert motion_error_px(moving(0.0), clip) is None


def test_frames_of_any_layout_and_range_are_compared() -> None:
    clips = np.stack([moving(1.0), moving(0.5)])[..., [0, 0, 0]]
    noisy = clips + 0.01 * np.random.default_rng(0).standard_normal(clips.shape)
    found = video_metrics(clips, noisy, "NTHWC")
    assert found["psnr_db"] == pytest.approx(40, abs=0.5)
    axes = [0, 4, 1, 2, 3]
    again = video_metrics(5 * clips.transpose(axes) - 2, 5 * noisy.transpose(axes) - 2, "NCTHW")
    assert again["psnr_db"] == pytest.approx(found["psnr_db"], abs=0.1)
    assert again["ssim"] == pytest.approx(found["ssim"], abs=1e-2)
    same = compare_outputs(clips, clips, labels=None, task="restore", layout="NTHWC")
    assert same["psnr_db"] == 100.0
    assert same["flicker_percent"] == same["motion_error_px"] == 0.0
    # No frames: five axes that are features, a vector, nothing but one value.
    assert video_metrics(np.zeros((2, 4, 8, 8, 16)), np.zeros((2, 4, 8, 8, 16)), "NTHWC") == {}
    assert video_metrics(np.ones((2, 8)), np.ones((2, 8)), "NTHWC") == {}
    assert video_metrics(np.ones_like(clips), np.ones_like(clips), "NTHWC") == {}
    assert not math.isnan(found["motion_error_px"] or 0.0)
