"""Bias correction: the mean error of the output is moved into the bias.

What: rounding shifts the mean of each output; over the calibration tokens that mean error is known
and is subtracted for good.
Source: Nagel et al., 2019 (https://arxiv.org/abs/1906.04721), section 4.2, from calibration data.
What we changed: the mean is over what really arrives at the rounding, rotated, smoothed and rounded
itself. A layer without a bias gets one.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import torch

from vcompress.compress.algorithms.working import Working

__all__ = ["corrected_bias"]


def corrected_bias(working: Working, values: torch.Tensor) -> torch.Tensor:
    """The bias `[N]` with which `values` `[N, K]`, the rounded weight, have no mean error."""
    mean, mean_rounded = working.means
    shift = working.weight @ mean - values @ mean_rounded
    bias = working.problem.bias
    return shift if bias is None else bias.float() + shift
