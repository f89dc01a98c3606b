"""What planning may look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from vcompress.calib.clips import Clips
from vcompress.calib.stats import Stats
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.target import Target
from vcompress.spec.token_section import TokenSection

__all__ = ["PlanContext", "Stage", "TokenRequest"]

TokenRequest = float | Budget | TokenSection

# Names a stage and its number of steps; the context gives the function that takes steps done.
Stage = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

_NUM_MEASUREMENT_CLIPS = 8


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What planning may look at.

    Attributes:
        target: the deployment.
        stats: what calibration observed; covers the union of all passes' needs.
        original: the model before any pass.
        calibration: the clips.
        tokens: the share of tokens that blocks see on average, a budget to search a schedule
            under, a schedule, or None to leave tokens alone.
        algorithm: how inputs and weights are calibrated, a name in `calibration.ALGORITHMS`.
        max_layer_error: see `spec.defaults.MAX_LAYER_ERROR`.
        budget: what formats are searched under; None to take the target's in their order.
        seed: of every random choice.
        stage: shows progress.
        warn: told what the user should know now.
    """

    target: Target
    stats: Stats
    original: VideoModel
    calibration: Clips
    tokens: TokenRequest | None
    algorithm: str
    max_layer_error: float
    budget: Budget | None
    seed: int
    stage: Stage
    warn: Callable[[str], None]

    @property
    def clips(self) -> torch.Tensor:
        """A few calibration clips `[B, *input_shape]`, for measurements of single blocks."""
        return torch.from_numpy(next(self.calibration.batches(_NUM_MEASUREMENT_CLIPS)))
