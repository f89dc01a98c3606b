"""Bipartite soft matching: tokens that say the same become one.

Source: Token Merging (Bolya et al., 2022, arXiv:2210.09461), written from the paper.
What we changed: the reduction stands in front of a block rather than between its attention and its
MLP, so that any block is used unchanged; a reduction below half of the tokens repeats the matching;
masks are not needed, since special tokens never come here.

In frames of an even number of places a place is in the same set in all frames, so a token never
joins itself at another time; `frames`, `energy` and `static_frames` do that. Chequerboards over
time or height instead cost more on the reference model when half of the tokens go.

The ranking is one sort of N / 2 tokens.

Shapes: B sequences, N tokens, D width of a key, r tokens that are merged.
Tokens at even positions form the set A (ceil(N/2)), at odd positions the set B (floor(N/2)).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vcompress.compress.tokens.decisions import decided
from vcompress.compress.tokens.ranking import descending
from vcompress.compress.tokens.reduction import Reduction, take

__all__ = ["match", "most_alike", "split_matching"]


def match(keys: torch.Tensor, merges: int) -> Reduction:
    """Merge the `merges` tokens of A that are most like a token of B, by cosine.

    Args:
        keys: `[B, N, D]`.
        merges: r, at most floor(N/2).
    """
    num_tokens = keys.shape[1]
    even = torch.arange(0, num_tokens, 2, device=keys.device).expand(keys.shape[0], -1)
    odd = torch.arange(1, num_tokens, 2, device=keys.device).expand(keys.shape[0], -1)
    return split_matching(keys[:, ::2], keys[:, 1::2], even, odd, merges)


def split_matching(
    a: torch.Tensor, b: torch.Tensor, a_index: torch.Tensor, b_index: torch.Tensor, merges: int
) -> Reduction:
    """Merge the `merges` tokens of the set A that are most like a token of the set B.

    Args:
        a, b: keys `[B, |A|, D]` and `[B, |B|, D]`.
        a_index, b_index: their positions among all tokens, `[B, |A|]` and `[B, |B|]`.
        merges: r, at most |A|.
    """
    # A zero key is like nobody; `normalize` keeps it zero, where a division gave NaN.
    likeness = functional.normalize(a.float(), dim=-1) @ functional.normalize(
        b.float(), dim=-1
    ).transpose(1, 2)
    return most_alike(likeness, a_index, b_index, merges)


def most_alike(
    likeness: torch.Tensor, a_index: torch.Tensor, b_index: torch.Tensor, merges: int
) -> Reduction:
    """As `split_matching`, from `likeness` `[B, |A|, |B|]` by any measure; larger is more alike."""
    best = likeness.amax(dim=-1)
    if merges == likeness.shape[1]:
        return Reduction(
            kept=b_index, source=a_index, target=_place_of(best, likeness),
            num_receivers=b_index.shape[1],
        )  # fmt: skip
    order = descending(best)
    source, stays = order[:, :merges], order[:, merges:]
    return Reduction(
        kept=torch.cat([a_index.gather(1, stays), b_index], dim=1),
        source=a_index.gather(1, source),
        # The place of the largest costs more than the largest, so only sources ask for it.
        target=_place_of(best.gather(1, source), take(likeness, source)),
        num_receivers=b_index.shape[1],
    )


def _place_of(largest: torch.Tensor, likeness: torch.Tensor) -> torch.Tensor:
    """The first place of `largest` `[B, r]` in the rows of `likeness` `[B, r, |B|]`.

    What `argmax` gives, by comparisons, which OpenVINO does several times as fast.
    """
    count = likeness.shape[2]
    places = torch.arange(count, device=likeness.device, dtype=torch.float32)
    # NaN equals nothing; its place is the last, so that no index is ever outside.
    found = torch.where(likeness >= largest[..., None], places, count - 1)
    chosen: torch.Tensor = decided(found.amin(dim=-1, keepdim=True).long(), likeness)
    return chosen[..., 0]
