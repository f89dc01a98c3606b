"""Metrics that one kind of task has: confidence, events in time, and frames that move.

- Calibration error: the expected calibration error of the top class (Guo et al., 2017,
  arXiv:1706.04599), 15 bins of equal width. A compressed classifier can name the same classes and
  be surer, or less sure, than it should.
- Average precision (Salton and McGill, 1983; the sum form, without interpolation): how well scores
  rank what is an event above what is none. Here the baseline's own events are what is to be found.
- Flicker and motion error: see `frames`.

Shapes: N clips, C classes, M scores of all clips.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vcompress.validate.frames import Frames, flicker_percent, motion_error_px, psnr_db, ssim

__all__ = [
    "average_precision", "detection_metrics", "expected_calibration_error", "video_metrics",
]  # fmt: skip

_NUM_BINS = 15
# Optical flow takes most of a second for a clip; more of them change the mean little.
_MOST_CLIPS_WITH_MOTION = 16


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean distance, in percentage points, of confidence from accuracy, bin by bin.

    Args:
        logits: `[N, C]`.
        labels: `[N]`.
    """
    x = np.asarray(logits).astype(np.float64)
    x = np.exp(x - x.max(axis=1, keepdims=True))
    confidence = x.max(axis=1) / x.sum(axis=1)
    right = x.argmax(axis=1) == np.asarray(labels)
    # A confidence at an edge belongs to the bin below it.
    bins = np.clip(np.ceil(confidence * _NUM_BINS).astype(int) - 1, 0, _NUM_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=_NUM_BINS)
    return 100 * float(np.abs(gaps).sum()) / len(x)


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float | None:
    """Mean precision at each true event, the highest score first; None without an event.

    Equal scores are one threshold, so that their order is none of chance.

    Args:
        scores: `[M]`.
        truth: `[M]`, whether each is an event.
    """
    x, events = np.asarray(scores, np.float64).ravel(), np.asarray(truth, bool).ravel()
    if not events.any():
        return None
    order = np.argsort(-x, kind="stable")
    x, events = x[order], events[order]
    last_of_equals = np.append(np.diff(x) != 0, True)
    found = np.cumsum(events)[last_of_equals]
    precision = found / (np.flatnonzero(last_of_equals) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / events.sum())


def detection_metrics(baseline: NDArray[Any], candidate: NDArray[Any]) -> dict[str, float | None]:
    """Of scores a moment, `[N, T, ...]` as logits; an event is where the baseline is above 0."""
    events = baseline > 0
    precision = average_precision(candidate, events)
    return {
        "average_precision_percent": None if precision is None else 100 * precision,
        "num_baseline_events": int(events.sum()),
        "num_events": int((candidate > 0).sum()),
        "moments_agreeing_percent": 100 * float(((candidate > 0) == events).mean()),
    }


def video_metrics(
    baseline: NDArray[Any], candidate: NDArray[Any], layout: str
) -> dict[str, float | None]:
    """Of frames, means over the clips; empty where outputs are no frames of `layout`.

    Values are counted from the lowest to the highest of the baseline's, on all clips.

    Args:
        baseline, candidate: `[N, ...]` in the order of `layout`.
        layout: axes of a batch, such as "NCTHW".
    """
    if baseline.ndim != len(layout) or baseline.shape[layout.index("C")] not in (1, 3):
        return {}
    low, high = float(baseline.min()), float(baseline.max())
    if high <= low:
        return {}
    axes = [layout.index(axis) for axis in "NTHWC"]
    pairs = [
        tuple(_frames(outputs[index : index + 1], axes, low, high) for outputs in
              (baseline, candidate))
        for index in range(len(baseline))
    ]  # fmt: skip
    motion = [motion_error_px(a, b) for a, b in pairs[:_MOST_CLIPS_WITH_MOTION]]
    known = [each for each in motion if each is not None]
    return {
        "psnr_db": float(np.mean([psnr_db(a, b) for a, b in pairs])),
        "psnr_db_min": float(np.min([psnr_db(a, b) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
        "flicker_percent": float(np.mean([flicker_percent(a, b) for a, b in pairs])),
        "motion_error_px": float(np.mean(known)) if known else None,
    }


def _frames(outputs: NDArray[Any], axes: list[int], low: float, high: float) -> Frames:
    # What leaves the range is an error, so nothing is clipped.
    return cast("Frames", (outputs.transpose(axes)[0].astype(np.float32) - low) / (high - low))
