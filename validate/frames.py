"""How far a clip is from the one that the full model makes of the same noise or the same input.

Shapes: T frames, H W pixels, C channels; values from 0 to 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vcompress.spec.errors import InputError

__all__ = ["Frames", "flicker_percent", "motion_error_px", "psnr_db", "ssim"]

Frames = NDArray[np.float32]

# Equal clips have no error at all; a mean over clips needs a number.
_MOST_DB = 100.0
_WINDOW_SIGMA = 1.5
_WINDOW_RADIUS = 5
_LEAST_MOTION_PX = 0.1
_C1, _C2 = 0.01**2, 0.03**2


def psnr_db(reference: Frames, candidate: Frames) -> float:
    """Peak signal to noise ratio of the clip `[T, H, W, C]`, at most 100 dB."""
    _check(reference, candidate)
    error = float(np.mean((reference.astype(np.float64) - candidate) ** 2))
    return _MOST_DB if error <= 10 ** (-_MOST_DB / 10) else -10 * math.log10(error)


def ssim(reference: Frames, candidate: Frames) -> float:
    """Structural similarity (Wang et al., 2004) of `[T, H, W, C]`, mean over frames and channels.

    Gaussian window of 11 pixels, as in the paper; at the border what is there is weighted.
    """
    _check(reference, candidate)
    a, b = (np.moveaxis(clip.astype(np.float64), -1, 1) for clip in (reference, candidate))
    blur_y, blur_x = (_blur(a.shape[axis]) for axis in (-2, -1))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        blurred: NDArray[np.float64] = blur_y @ values @ blur_x.T
        return blurred

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    bottom = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float(np.mean(top / bottom))


def flicker_percent(reference: Frames, candidate: Frames) -> float:
    """What changes from frame to frame and should not, or the other way round.

    The root mean square of the difference between the two clips' changes from each frame to the
    next, in percent of the range; an error that stands still counts for nothing. `[T, H, W, C]`;
    0 for a single frame.
    """
    _check(reference, candidate)
    error = np.diff(candidate.astype(np.float64) - reference, axis=0)
    return 100 * math.sqrt(float(np.mean(error**2))) if error.size else 0.0


def motion_error_px(reference: Frames, candidate: Frames) -> float | None:
    """How far motion departs, in pixels a frame: the end-point error of the optical flow.

    The mean over the pixels that move in the reference, by iterative Lucas-Kanade (Le Besnerais and
    Champagnat, 2005) as scikit-image has it. None where nothing moves by a tenth of a pixel, or
    without scikit-image.
    """
    _check(reference, candidate)
    try:
        from skimage.registration import optical_flow_ilk
    except ImportError:
        return None
    grey = [clip.astype(np.float32).mean(axis=-1) for clip in (reference, candidate)]
    errors: list[NDArray[np.float64]] = []
    for now in range(len(reference) - 1):
        flows = [optical_flow_ilk(clip[now], clip[now + 1]) for clip in grey]
        moves = np.hypot(*flows[0]) > _LEAST_MOTION_PX
        errors.append(np.hypot(*(flows[1] - flows[0]))[moves])
    found = np.concatenate(errors) if errors else np.empty(0)
    return float(found.mean()) if found.size else None


def _blur(size: int) -> NDArray[np.float64]:
    """A Gaussian along one axis as a matrix `[size, size]` whose rows sum to 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (distance / _WINDOW_SIGMA) ** 2) * (abs(distance) <= _WINDOW_RADIUS)
    normalised: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return normalised


def _check(reference: Frames, candidate: Frames) -> None:
    if reference.shape != candidate.shape or reference.ndim != 4:
        message = (
            f"clips must be [T, H, W, C] of one shape, got {reference.shape} and {candidate.shape}"
        )
        raise InputError(message)
