"""Decide a schedule without a search: every block gives away the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.rules import Remains, objection, objection_to
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection, TokenSite

__all__ = ["constant_schedule", "default_technique", "plan_constant", "section_of"]

# What rounding to whole tokens may add to the share that was asked for.
_RATIO_TOLERANCE = 0.02


def constant_schedule(num_patches: int, num_blocks: int, ratio: float, unit: int = 1) -> list[int]:
    """Tokens in front of each block, so that the blocks see `ratio` of them on average.

    With r fewer in front of every block but the first, block i sees N - i r tokens; the mean over
    L blocks is N - r (L - 1) / 2, so r = 2 N (1 - ratio) / (L - 1). No count is below `unit`, of
    which all are multiples.
    """
    if num_blocks < 2 or ratio >= 1:
        return [num_patches] * num_blocks
    fewer = 2 * num_patches * (1 - ratio) / (num_blocks - 1)
    counts = [num_patches - block * fewer for block in range(num_blocks)]
    return [max(unit, unit * round(count / unit)) for count in counts]


def section_of(
    model: VideoModel, counts: Sequence[int], technique: str, attention: str
) -> TokenSection:
    """A section whose blocks see `counts` patches, reduced by one technique wherever they fall."""
    assert model.token_grid is not None
    left, sites = model.token_grid.num_patches, {}
    for block, count in zip(model.token_blocks, counts, strict=True):
        if count < left:
            sites[block] = TokenSite(technique=technique, keep=count)
            left = count
    return TokenSection(attention=attention, num_patches=model.token_grid.num_patches, sites=sites)


def default_technique(model: VideoModel) -> str:
    """Bipartite matching, or its form for models that need the same places in all frames.

    Raises:
        InputError: `model` takes neither.
    """
    names = ("bipartite", "places")
    for name in names:
        if name in TECHNIQUES and objection_to(model, name) is None:
            return name
    message = f"tokens cannot be reduced: {objection_to(model, names[0])}; leave --tokens out"
    raise InputError(message)


def plan_constant(model: VideoModel, ratio: float, clips: torch.Tensor) -> TokenSection:
    """A constant schedule for `ratio`, with proportional attention if `clips` say it is better.

    Args:
        model: the model.
        ratio: mean share of patch tokens that a block sees, in (0, 1].
        clips: calibration clips `[B, *input_shape]`; the variant whose output is nearer to the
            unreduced model's (relative L2) is taken.
    """
    if not 0 < ratio <= 1:
        message = f"--tokens must be above 0 and at most 1 (1 reduces nothing), got {ratio}"
        raise InputError(message)
    reason = objection(model)
    if reason is not None:
        message = f"--tokens {ratio}: {reason}; leave --tokens out"
        raise InputError(message)
    assert model.token_grid is not None
    technique, num_patches = default_technique(model), model.token_grid.num_patches
    counts = constant_schedule(
        num_patches, len(model.token_blocks), ratio, Remains.of(model).unit(TECHNIQUES[technique])
    )
    reached = sum(counts) / len(counts) / num_patches
    if reached > ratio + _RATIO_TOLERANCE:
        message = (
            f"--tokens {ratio}: with the same number taken away in front of each of "
            f"{len(counts)} blocks, they see {reached:.2f} on average; ask for that or more, or "
            "for --tokens auto"
        )
        raise InputError(message)
    baseline = model(clips)
    variants = [
        section_of(model, counts, technique, attention) for attention in ("plain", "proportional")
    ]
    return min(variants, key=lambda section: _error(model, section, clips, baseline))


def _error(
    model: VideoModel, section: TokenSection, clips: torch.Tensor, baseline: torch.Tensor
) -> float:
    trial = model.copy()
    apply_reduction(trial, section)
    return float(torch.linalg.vector_norm(trial(clips) - baseline))
