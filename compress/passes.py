"""The passes, in their order: each decides its section of the plan, then executes it.

A pass plans on the model as the passes before it left it: activations are calibrated after tokens
were merged. `apply` decides nothing; it does what the section says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from vcompress.compress.attention_plan import decide_attention
from vcompress.compress.attention_sites import apply_attention
from vcompress.compress.context import PlanContext
from vcompress.compress.dynamic import DynamicPrecision, apply_dynamic
from vcompress.compress.precision import plan_precision
from vcompress.compress.quantize import apply_choices
from vcompress.compress.tensors import TOKENS, ModelTensors
from vcompress.compress.tokens.decide import decide_tokens
from vcompress.compress.tokens.readout import apply_readout
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.video import VideoModel
from vcompress.spec.plan import CompressionPlan

__all__ = ["PASSES", "AttentionPass", "Pass", "Planned", "dynamic_of"]


@dataclass(frozen=True)
class Planned:
    """A plan, and the calibrated tensors that go with it."""

    plan: CompressionPlan
    tensors: ModelTensors


class Pass(Protocol):
    """One technique."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it reads (see `calib.observe`)."""
        ...

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """`plan` with this pass's section filled in, and the tensors that the section names."""
        ...

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Execute this pass's section of `plan` on `model`, in place."""
        ...


class TokenPass:
    """Token reduction."""

    needs: frozenset[str] = frozenset()

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """The section `tokens`, if tokens are to be reduced."""
        if context.tokens is None:
            return Planned(plan, {})
        decided = decide_tokens(model, context.tokens, context)
        evidence = {**plan.evidence, "tokens": decided.evidence}
        tensors = {TOKENS: decided.tensors} if decided.tensors else {}
        return Planned(replace(plan, tokens=decided.section, evidence=evidence), tensors)

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Install the hooks that reduce, and the readout that goes with them."""
        if plan.tokens is not None:
            own = tensors.get(TOKENS, {})
            apply_reduction(model, plan.tokens, own)
            if plan.tokens.readout is not None:
                apply_readout(model, plan.tokens.readout, own)


class QuantizePass:
    """Per-layer precision."""

    needs: frozenset[str] = frozenset({"input_amax", "outputs"})

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """The section `quantize`."""
        made = plan_precision(model, context)
        evidence = {**plan.evidence, **made.evidence}
        return Planned(replace(plan, quantize=made.choices, evidence=evidence), made.tensors)

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Freeze the layers."""
        apply_choices(model, plan.quantize, tensors)


class AttentionPass:
    """Products of attention in eight bits; layers are then calibrated on what these give."""

    needs: frozenset[str] = frozenset()

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """The section `attention`, if it is asked for."""
        decided = decide_attention(model, context)
        if decided is None:
            return Planned(plan, {})
        section, measured = decided
        evidence = {**plan.evidence, "attention": measured}
        return Planned(replace(plan, attention=section, evidence=evidence), {})

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Put quantized products in the place of those of the chosen attentions."""
        if plan.attention is not None:
            apply_attention(model.module, plan.attention)


class DynamicPass:
    """Inputs of a denoiser's NVFP4 layers whose precision changes from step to step."""

    needs: frozenset[str] = frozenset()

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """The section `dynamic_precision`, if there is to be one."""
        if context.dynamic is None:
            return Planned(plan, {})
        section, measured = context.dynamic(model.module)
        evidence = {**plan.evidence, "dynamic_precision": dict(measured)}
        return Planned(replace(plan, dynamic_precision=section, evidence=evidence), {})

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Nothing: one call has no steps, and a graph has one precision. See `compressed`."""


class CachePass:
    """What a denoiser uses again from step to step, found with everything else in place."""

    needs: frozenset[str] = frozenset()

    def plan(self, model: VideoModel, plan: CompressionPlan, context: PlanContext) -> Planned:
        """The section `cache`, if there is to be one."""
        if context.cache is None:
            return Planned(plan, {})
        with dynamic_of(model.module, plan):
            section, measured = context.cache(model.module)
        evidence = {**plan.evidence, "cache": dict(measured)}
        return Planned(replace(plan, cache=section, evidence=evidence), {})

    def apply(self, model: VideoModel, plan: CompressionPlan, tensors: ModelTensors) -> None:
        """Nothing: one call has no steps. `compressed` puts the cache in place for whole runs."""


def dynamic_of(
    module: nn.Module, plan: CompressionPlan
) -> AbstractContextManager[DynamicPrecision | None]:
    """The section `dynamic_precision` of `plan` in place on `module`, if it has one."""
    section = plan.dynamic_precision
    return nullcontext() if section is None else apply_dynamic(module, section)


PASSES: tuple[Pass, ...] = (
    TokenPass(),
    AttentionPass(),
    QuantizePass(),
    DynamicPass(),
    CachePass(),
)
