"""A line that predicts what four bits cost from a signal of the step before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Line", "fit_line"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """error = alpha * signal + beta.

    Attributes:
        alpha, beta: least squares.
        correlation: of Pearson between signal and error; nan where one of them never changes.
        num_points: that it was fitted to.
    """

    alpha: float
    beta: float
    correlation: float
    num_points: int


def fit_line(signal: NDArray[np.float64], error: NDArray[np.float64]) -> Line:
    """The line through points, by least squares; level where the signal never changes."""
    # A deviation of equal numbers is not quite zero.
    spread = float(signal.std() * error.std()) if np.ptp(signal) and np.ptp(error) else 0.0
    covariance = float(np.mean((signal - signal.mean()) * (error - error.mean())))
    alpha = covariance / float(signal.var()) if np.ptp(signal) else 0.0
    return Line(
        alpha=alpha, beta=float(error.mean() - alpha * signal.mean()),
        correlation=covariance / spread if spread > 0 else float("nan"), num_points=len(signal),
    )  # fmt: skip
