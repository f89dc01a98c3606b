"""Sorting that every runtime takes, however many there are to sort.

TensorRT's TopK gives at most 3,840 entries back, and a complete order of more needs more. Beyond
that each entry's rank is counted instead: how many are above it, and of its equals, how many stand
before it. That is exact, and as many comparisons as one row of likenesses to all others has; it is
done in blocks, so that no large matrix is ever whole.

Shapes: B sequences, N entries.
"""

from __future__ import annotations

import torch

from vcompress.compress.tokens.decisions import decided

__all__ = ["LARGEST_TOPK", "ascending", "ascending_order", "descending"]

LARGEST_TOPK = 3840
# Rows of a block of comparisons.
_BLOCK = 1024


def descending(scores: torch.Tensor) -> torch.Tensor:
    """Places `[..., N]`, int64, of `scores` `[..., N]` from the largest to the smallest.

    Which of equals comes first is open up to 3,840 entries; beyond, the one that stands first.
    """
    ordered: torch.Tensor = decided(_descending(scores), scores)
    return ordered


def _descending(scores: torch.Tensor) -> torch.Tensor:
    count = scores.shape[-1]
    if count <= LARGEST_TOPK:
        return scores.topk(count, dim=-1).indices
    ranks = _ranks(scores)
    places = torch.arange(count, device=scores.device)
    ordered = []
    for first in range(0, count, _BLOCK):
        wanted = places[first : first + _BLOCK]
        found = ranks[..., None, :] == wanted[:, None]
        # The inverse of a permutation without a scatter: one place a row is added up.
        ordered.append(torch.where(found, places, 0).sum(-1))
    return torch.cat(ordered, dim=-1)


def ascending(places: torch.Tensor) -> torch.Tensor:
    """Distinct integers `[..., N]` below 2^24, sorted; int64."""
    return places.gather(-1, ascending_order(places))


def ascending_order(numbers: torch.Tensor) -> torch.Tensor:
    """Places of integers `[..., N]` below 2^24 from the smallest to the largest; int64."""
    return _descending(-numbers.float())


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """How many stand in front of each entry, int64 `[..., N]`."""
    count = scores.shape[-1]
    places = torch.arange(count, device=scores.device)
    ranks = []
    for first in range(0, count, _BLOCK):
        own = scores[..., first : first + _BLOCK, None]
        others = scores[..., None, :]
        before = places[None, :] < places[first : first + _BLOCK, None]
        ahead = (others > own) | ((others == own) & before)
        ranks.append(ahead.sum(-1))
    return torch.cat(ranks, dim=-1)
