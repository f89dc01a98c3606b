"""The last look at calibrated layers: all of them together, on clips that nothing was fitted to.

What: every layer of a transformer may be nearer to its original on tokens that it was not fitted
to, and the model further from its own: with few clips the errors of fitted layers point the same
way, and add up in a way that no layer shows alone. So the output of the whole model is compared
with that of plain rounding, clip by clip. If all solutions together are worse, those of the layers
that gain most are tried, half of them and a quarter; if these are not better either, none is used.

`auto`, and parts of a solution that nobody asked for, must be better by more than the noise, in the
loss of the task or in the error of the output, and worse in neither: the noise is the standard
error of the mean over the clips, or what is assumed where clips are too few to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vcompress.compress.algorithms.problem import Solution
from vcompress.compress.block_error import replaced_all
from vcompress.compress.brute_force import reference_outputs
from vcompress.compress.calibration import freeze_solutions
from vcompress.compress.clip_choice import batches_of, fit_and_judge
from vcompress.compress.context import PlanContext
from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.models.video import VideoModel

__all__ = ["without_harm"]

_NUM_CLIPS = 32
_SHARES = (0.5, 0.25)
# Over the number of clips: how far the logarithm of the ratio of two losses may be off. DINOv2-S
# fitted to three frames had half the loss on a fourth, and a sixth more on eight others.
_ASSUMED_NOISE = 0.6


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judged:
    """Solutions and what the model loses with them, clip by clip, float64.

    Attributes:
        losses: in the loss of the task.
        errors: squared relative errors of the output.
    """

    solutions: dict[str, Solution]
    losses: torch.Tensor
    errors: torch.Tensor

    @property
    def mean(self) -> float:
        """Mean loss; infinite where it is not a number."""
        mean = float(self.losses.mean())
        return math.inf if math.isnan(mean) else mean

    def is_no_worse_than(self, other: _Judged) -> bool:
        """Whether the loss is not above that of `other`."""
        return _gain(self.losses, other.losses)[0] >= 0

    def is_better_than(self, other: _Judged) -> bool:
        """Whether loss or error is less than that of `other` by more than noise, neither more.

        KL near the border of two classes says little about which solution is nearer; the error of
        the output tells it from far fewer clips.
        """
        gains = [_gain(self.losses, other.losses), _gain(self.errors, other.errors)]
        return any(gain > noise for gain, noise in gains) and all(
            gain >= -noise for gain, noise in gains
        )


def _gain(losses: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """By what share `losses` are less than `others`, and the noise of that number.

    The share is the mean over the clips of the logarithm of the ratio: a few clips at the border of
    two classes make up most of a mean of KL, and say little of all the others. It is a gain only if
    the mean is less as well.
    """
    if not bool(losses.isfinite().all()):
        return -math.inf, 0.0
    if not bool(others.isfinite().all()):
        return math.inf, 0.0
    gains, count = torch.log(_positive(others) / _positive(losses)), len(losses)
    seen = float(gains.std() / math.sqrt(count)) if count > 1 else 0.0
    gain = float(gains.mean())
    if float(losses.mean()) > float(others.mean()):
        gain = min(gain, 0.0)
    return gain, max(seen, _ASSUMED_NOISE / count)


def _positive(losses: torch.Tensor) -> torch.Tensor:
    """Losses that have a logarithm; below the least of float32 they are rounding."""
    return losses.clamp(min=1e-9)


def without_harm(
    model: VideoModel, formats: Mapping[str, str], solutions: dict[str, Solution],
    context: PlanContext,
) -> tuple[dict[str, Solution], str | None]:  # fmt: skip
    """`solutions`, or as many of them as the model as a whole is better off with.

    Returns:
        The solutions, the others rounded plainly, and one line with the losses; None where there
        was nothing to compare.
    """
    changed = [name for name, each in solutions.items() if each.tensors or each.rotation]
    if not changed:
        return solutions, None
    judge = fit_and_judge(context.calibration)[1] or context.calibration
    batches = batches_of(judge, _NUM_CLIPS)
    references, loss = reference_outputs(model, batches), loss_of(model.task)
    error = TaskLoss("squared_relative_error")

    def judged(used: list[str]) -> _Judged:
        mixed = _mixed(solutions, set(used), context)
        with replaced_all(model.module, freeze_solutions(model, formats, mixed)):
            outputs = reference_outputs(model, batches)
        losses, errors = (
            torch.cat([
                each.values(*pair) for pair in zip(references, outputs, strict=True)
            ]).double().cpu()
            for each in (loss, error)
        )  # fmt: skip
        return _Judged(solutions=mixed, losses=losses, errors=errors)

    everything, nothing = judged(changed), judged([])
    compared = (
        f"{loss.name} {everything.mean:.2e} with {context.algorithm} on {len(nothing.losses)} "
        f"calibration clips, {nothing.mean:.2e} with plain rounding"
    )
    if (
        everything.is_better_than(nothing)
        if context.algorithm == "auto"
        else everything.is_no_worse_than(nothing)
    ):
        return solutions, compared
    best = nothing
    by_gain = sorted(changed, key=lambda name: solutions[name].gain, reverse=True)
    for share in _SHARES:
        part = by_gain[: round(share * len(by_gain))]
        if not part:
            break
        some = judged(part)
        compared += f", {some.mean:.2e} with it in {len(part)} layers"
        if some.is_better_than(nothing) and some.mean < best.mean:
            best = some
    words = "every layer is" if best is nothing else "the other layers are"
    context.warn(f"{compared}: {words} rounded plainly")
    return best.solutions, compared


def _mixed(
    solutions: Mapping[str, Solution], used: set[str], context: PlanContext
) -> dict[str, Solution]:
    """`solutions` of the layers in `used`; plain rounding of the others."""
    note = f"{context.algorithm} not used: the whole model is not better with it"
    return {
        name: solution
        if name in used or not (solution.tensors or solution.rotation)
        else Solution(input_amax=context.stats.input_amax[name], note=note)
        for name, solution in solutions.items()
    }
