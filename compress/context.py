"""What planning may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vcompress.calib.calls import Samples
from vcompress.calib.stats import Stats
from vcompress.compress.latency_table import LatencyTable
from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.defaults import ATTENTION
from vcompress.spec.dynamic_section import DynamicSection
from vcompress.spec.target import Target
from vcompress.spec.token_section import TokenSection

__all__ = ["CacheRequest", "DynamicRequest", "PlanContext", "Stage", "TokenRequest"]

TokenRequest = float | Budget | TokenSection

# Finds the cache of a denoiser as the passes before have left it, with its evidence.
CacheRequest = Callable[[nn.Module], tuple[CacheSection | None, Mapping[str, Any]]]

# Decides how the inputs of a denoiser's layers change from step to step, with its evidence.
DynamicRequest = Callable[[nn.Module], tuple[DynamicSection | None, Mapping[str, Any]]]

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
        calibration: the clips, or the recorded calls.
        tokens: the share of tokens that blocks see on average, a budget to search a schedule
            under, a schedule, or None to leave tokens alone.
        attention: "keep", "auto" or a format for the products of attention.
        latency: what a budget of time is counted by; None for other budgets.
        dynamic: finds how inputs change from step to step; None to leave them as they are.
        cache: finds what is used again from step to step; None to compute everything.
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
    calibration: Samples
    tokens: TokenRequest | None
    algorithm: str
    max_layer_error: float
    budget: Budget | None
    seed: int
    stage: Stage
    warn: Callable[[str], None]
    attention: str = ATTENTION
    latency: LatencyTable | None = None
    cache: CacheRequest | None = None
    dynamic: DynamicRequest | None = None

    @property
    def clips(self) -> Batch:
        """A few calibration clips or calls, for measurements of single blocks."""
        return next(self.calibration.tensors(_NUM_MEASUREMENT_CLIPS))
