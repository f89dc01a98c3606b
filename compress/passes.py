"""The passes, in their order: each decides its section of the plan, then executes it.

A pass plans on the model as the passes before it left it: activations are calibrated after tokens
were merged. `apply` decides nothing; it does what the section says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vcompress.calib.stats import Stats
from vcompress.compress import quantize, sensitivity
from vcompress.compress.tokens.plan import plan_merging
from vcompress.compress.tokens.surgery import apply_merging
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.target import Target

__all__ = ["PASSES", "Pass", "PlanContext"]


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What planning may look at.

    Attributes:
        target: the deployment.
        stats: what calibration observed; covers the union of all passes' needs.
        original: the model before any pass.
        clips: a few calibration clips `[B, *input_shape]`, for measurements.
        tokens: share of tokens to keep, or None to leave tokens alone.
        max_layer_error: see `spec.defaults.MAX_LAYER_ERROR`.
        smoothing: calibrated input factors by layer, from an algorithm that makes them.
        on_layer: told the number of layers that are done.
    """

    target: Target
    stats: Stats
    original: VideoModel
    clips: torch.Tensor
    tokens: float | None
    max_layer_error: float
    smoothing: Mapping[str, torch.Tensor]
    on_layer: Callable[[int], None] | None = None


class Pass(Protocol):
    """One technique."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it reads (see `calib.observe`)."""
        ...

    def plan(
        self, model: VideoModel, plan: CompressionPlan, context: PlanContext
    ) -> CompressionPlan:
        """`plan` with this pass's section filled in. Changes nothing else."""
        ...

    def apply(
        self, model: VideoModel, plan: CompressionPlan, smoothing: Mapping[str, torch.Tensor]
    ) -> None:
        """Execute this pass's section of `plan` on `model`, in place."""
        ...


class TokenPass:
    """Token merging."""

    needs: frozenset[str] = frozenset()

    def plan(
        self, model: VideoModel, plan: CompressionPlan, context: PlanContext
    ) -> CompressionPlan:
        """The section `tokens`, if tokens are to be merged."""
        if context.tokens is None:
            return plan
        return replace(plan, tokens=plan_merging(model, context.tokens, context.clips))

    def apply(
        self, model: VideoModel, plan: CompressionPlan, _smoothing: Mapping[str, torch.Tensor]
    ) -> None:
        """Install the hooks that merge."""
        if plan.tokens is not None:
            apply_merging(model, plan.tokens)


class QuantizePass:
    """Per-layer precision."""

    needs: frozenset[str] = frozenset({"input_amax"})

    def plan(
        self, model: VideoModel, plan: CompressionPlan, context: PlanContext
    ) -> CompressionPlan:
        """The section `quantize`. Scores come from the original model: blocks run alone there."""
        candidates = {
            name: candidate
            for name, candidate in quantize.candidate_formats(model, context.target).items()
            if candidate != FLOAT
        }
        scores = sensitivity.measure_sensitivity(
            context.original, candidates, context.stats.input_amax, context.clips,
            context.smoothing, context.on_layer,
        )  # fmt: skip
        choices = quantize.choose(
            model,
            context.target,
            input_amax=context.stats.input_amax,
            scores=scores,
            max_layer_error=context.max_layer_error,
        )
        return replace(plan, quantize=choices)

    def apply(
        self, model: VideoModel, plan: CompressionPlan, smoothing: Mapping[str, torch.Tensor]
    ) -> None:
        """Freeze the layers."""
        quantize.apply_choices(model, plan.quantize, smoothing)


PASSES: tuple[Pass, ...] = (TokenPass(), QuantizePass())
