"""From what is asked for to a token section: a share of tokens, a budget, or a section as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vcompress.calib.calls import Samples, clips_of
from vcompress.calib.clips import permutation
from vcompress.compress.context import PlanContext, TokenRequest
from vcompress.compress.tensors import LayerTensors
from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.flops import ScheduleCost, counts_of
from vcompress.compress.tokens.plan import plan_constant
from vcompress.compress.tokens.rules import check_section, objection, objection_to
from vcompress.compress.tokens.search import TokenSearch
from vcompress.compress.tokens.trials import Trials
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection

__all__ = [
    "NUM_SEARCH_CLIPS", "DecidedTokens", "decide_tokens", "refitted_on", "refused_techniques",
    "too_few_clips", "trials_on", "with_readout",
]  # fmt: skip

# A bar in points is read off these: one clip in 64 is 1.6 points.
NUM_SEARCH_CLIPS = 256
_BATCH_SIZE = 16


@dataclass(frozen=True)
class DecidedTokens:
    """A section, or None where nothing holds the budget, and what it rests on.

    Attributes:
        section: with the readout's name if it is refitted.
        tensors: its weights then, and what fitted techniques need; for the plan's tensors.
        evidence: for the plan.
    """

    section: TokenSection | None
    tensors: LayerTensors
    evidence: Mapping[str, Any]


def decide_tokens(model: VideoModel, request: TokenRequest, context: PlanContext) -> DecidedTokens:
    """The section that `request` asks for.

    A section that is given has its readout refitted if it names one, and its techniques fitted, as
    the tensors of the plan that it comes from are not at hand; otherwise the readout is refitted
    where that helps.

    Raises:
        InputError: tokens of `model` cannot be reduced so.
    """
    reason = objection(model)
    if reason is not None:
        message = f"tokens cannot be reduced: {reason}; leave --tokens out"
        raise InputError(message)
    if isinstance(request, Budget):
        return _searched(model, request, context)
    if isinstance(request, TokenSection):
        check_section(model, request)
        if request.readout is None:
            trials = trials_on(model, context.calibration, context.seed)
            evidence = {"flop_share": _share(model, request)}
            return DecidedTokens(request, trials.fitted(request), evidence)
        section = request
    else:
        clips = context.clips
        assert isinstance(clips, torch.Tensor), "a model with a grid of tokens takes clips"
        section = plan_constant(model, request, clips)
    refitted = with_readout(model, section, context.calibration, context.seed)
    return replace(refitted, evidence={"flop_share": _share(model, section)})


def with_readout(
    model: VideoModel, section: TokenSection, clips: Samples, seed: int
) -> DecidedTokens:
    """`section` fitted to `clips`, with its readout refitted where that helps."""
    if not section.sites:
        return DecidedTokens(replace(section, readout=None), {}, {})
    return refitted_on(trials_on(model, clips, seed, len(clips)), section)


def refitted_on(trials: Trials, section: TokenSection) -> DecidedTokens:
    """`section` fitted to the clips of `trials`, with its readout refitted where that helps."""
    tensors, found = trials.fitted(section), trials.refitted(section)
    if found is None:
        return DecidedTokens(replace(section, readout=None), tensors, {})
    return DecidedTokens(replace(section, readout=found[0]), {**tensors, **found[1]}, {})


def trials_on(
    model: VideoModel, clips: Samples, seed: int, num_clips: int = NUM_SEARCH_CLIPS
) -> Trials:
    """Trials on some of `clips`, drawn from all over them: a folder's stand by class."""
    chosen = clips_of(clips).subset(permutation(len(clips), seed)[:num_clips])
    batches = [torch.from_numpy(batch) for batch in chosen.batches(_BATCH_SIZE)]
    return Trials(model, batches, seed=seed)


def refused_techniques(model: VideoModel) -> dict[str, str]:
    """Why `model` cannot take which techniques."""
    reasons = {name: objection_to(model, name) for name in TECHNIQUES}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def too_few_clips(budget: Budget, num_clips: int) -> str | None:
    """What to tell a user whose bar lets not a single one of `num_clips` clips change its class."""
    if budget.kind != "drop_points" or budget.limit * num_clips >= 100 or budget.limit <= 0:
        return None
    needed = math.ceil(100 / budget.limit)
    advice = (
        f"{needed} (--num-clips) let the search go on"
        if needed <= NUM_SEARCH_CLIPS
        else f"up to {NUM_SEARCH_CLIPS} (--num-clips) are looked at"
    )
    return (
        f"{budget.limit:g} points are less than one of {num_clips} calibration clips, so tokens "
        f"are reduced only as far as none of them changes its class; {advice}"
    )


def _searched(model: VideoModel, budget: Budget, context: PlanContext) -> DecidedTokens:
    with context.stage("tokens", None):
        trials = trials_on(model, context.calibration, context.seed)
        coarse = too_few_clips(budget, trials.num_clips)
        if coarse is not None:
            context.warn(coarse)
        search = TokenSearch(trials)
        by_share = budget.kind == "flop_share"
        found = search.at_share(budget.limit) if by_share else search.within(budget)
    evidence: dict[str, Any] = {
        "budget": {"kind": budget.kind, "limit": budget.limit},
        "num_schedules_measured": trials.num_measured,
        "refused": refused_techniques(model),
    }
    if found is None:
        context.warn(
            "no token schedule holds the bar on the calibration clips, so tokens are left alone"
        )
        return DecidedTokens(None, {}, evidence)
    evidence |= {
        "flop_share": found.flop_share,
        "loss": trials.loss.name,
        "loss_value": found.measured.loss,
        "changed_points": found.measured.changed_points,
    }
    refitted = with_readout(model, found.section, context.calibration, context.seed)
    return replace(refitted, evidence=evidence)


def _share(model: VideoModel, section: TokenSection) -> float:
    return ScheduleCost.of(model).share(counts_of(section, model.token_blocks))
