"""Decide a constant schedule: every block gives away the same number of tokens."""

from __future__ import annotations

import numpy as np
import torch

from vcompress.compress.tokens.merging import max_merges
from vcompress.compress.tokens.surgery import TECHNIQUE, apply_merging, objection
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.plan import TokenSection

__all__ = ["constant_schedule", "plan_merging"]

# What rounding to whole tokens may add to the share that was asked for.
_RATIO_TOLERANCE = 0.02


def constant_schedule(
    num_tokens: int, num_special: int, num_blocks: int, ratio: float
) -> list[int]:
    """Merges after each block so that the blocks process `ratio` of the tokens on average.

    With r merges after every block but the last, block i sees N - i r tokens; the mean over
    L blocks is N - r (L - 1) / 2, so r = 2 N (1 - ratio) / (L - 1). Nothing is merged after the
    last block: that would cost time and save none.
    """
    if num_blocks < 2 or ratio >= 1:
        return [0] * num_blocks
    wanted = round(2 * num_tokens * (1 - ratio) / (num_blocks - 1))
    schedule: list[int] = []
    remaining = num_tokens
    for _ in range(num_blocks - 1):
        merges = min(wanted, max_merges(remaining, num_special))
        schedule.append(merges)
        remaining -= merges
    return [*schedule, 0]


def _mean_share(schedule: list[int], num_tokens: int) -> float:
    seen = [num_tokens - sum(schedule[:block]) for block in range(len(schedule))]
    return sum(seen) / len(seen) / num_tokens


def plan_merging(model: VideoModel, ratio: float, clips: torch.Tensor) -> TokenSection:
    """A constant schedule for `ratio`, with proportional attention if `clips` say it is better.

    Args:
        ratio: mean share of tokens that a block processes, in (0, 1].
        clips: calibration clips `[B, *input_shape]`; the variant whose output is nearer to the
            unmerged model's (relative L2) is taken.
    """
    if not 0 < ratio <= 1:
        message = f"--tokens must be above 0 and at most 1 (1 merges nothing), got {ratio}"
        raise InputError(message)
    reason = objection(model)
    if reason is not None:
        message = f"--tokens {ratio}: {reason}; leave --tokens out"
        raise InputError(message)
    assert model.token_grid is not None
    grid = model.token_grid
    schedule = constant_schedule(grid.num_tokens, grid.special, len(model.blocks), ratio)
    reached = _mean_share(schedule, grid.num_tokens)
    if reached > ratio + _RATIO_TOLERANCE:
        message = (
            f"--tokens {ratio}: merging at most half of the tokens after each block, "
            f"{len(model.blocks)} blocks keep {reached:.2f} on average; ask for that or more"
        )
        raise InputError(message)
    baseline = model(clips)
    errors: list[float] = []
    sections: list[TokenSection] = []
    for proportional in (False, True):
        section = TokenSection(
            technique=TECHNIQUE,
            proportional=proportional,
            num_tokens=grid.num_tokens,
            merge=dict(zip(model.blocks, schedule, strict=True)),
        )
        trial = model.copy()
        apply_merging(trial, section)
        errors.append(float(torch.linalg.vector_norm(trial(clips) - baseline)))
        sections.append(section)
    return sections[int(np.argmin(errors))]
