"""Bipartite soft matching: merge the tokens that say the same.

Source: Token Merging (Bolya et al., 2022, arXiv:2210.09461), written from the paper.
What we changed: merging happens after a block rather than between its attention and its MLP, so
that any block can be used unchanged; the average is a product with a one-hot matrix instead of a
scatter, since `scatter_reduce(reduce="mean")` exports to ONNX as a different operation without a
word; masks are finite; every shape is fixed by the number of merges, so the graph stays static.

Shapes: B batch, N tokens, C width of a token, D width of the metric, r merged tokens.
Tokens at even positions form the set A (ceil(N/2)), at odd positions the set B (floor(N/2)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["Matching", "match", "max_merges", "merge"]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Which tokens are merged into which; int64 indices within A or B.

    Attributes:
        source: tokens of A that are merged, `[B, r]`.
        target: the tokens of B that they are merged into, `[B, r]`.
        kept: tokens of A that stay, in order, `[B, ceil(N/2) - r]`.
    """

    source: torch.Tensor
    target: torch.Tensor
    kept: torch.Tensor


def max_merges(num_tokens: int, num_special: int) -> int:
    """How many tokens one matching can merge at most: all of A but the special tokens in it."""
    return min((num_tokens + 1) // 2 - (num_special + 1) // 2, num_tokens // 2)


def match(metric: torch.Tensor, merges: int, num_special: int = 0) -> Matching:
    """Match the `merges` tokens of A that are most similar to a token of B, by cosine.

    Args:
        metric: what similarity is measured on, `[B, N, D]`: attention keys, averaged over heads.
        merges: r, at most `max_merges(N, num_special)`.
        num_special: leading tokens that are neither merged nor merged into.
    """
    unit = functional.normalize(metric.float(), dim=-1)
    a, b = unit[:, ::2], unit[:, 1::2]
    similarity = a @ b.transpose(1, 2)
    special_a, special_b = (num_special + 1) // 2, num_special // 2
    # -2 is below every cosine, and finite: infinities turn into NaN in low precision.
    if special_a:
        blocked = torch.full_like(similarity[:, :special_a], -2.0)
        similarity = torch.cat([blocked, similarity[:, special_a:]], dim=1)
    if special_b:
        blocked = torch.full_like(similarity[:, :, :special_b], -2.0)
        similarity = torch.cat([blocked, similarity[:, :, special_b:]], dim=2)
    best, partner = similarity.max(dim=-1)
    order = best.topk(best.shape[1], dim=1).indices
    source = order[:, :merges]
    kept = order[:, merges:].sort(dim=1).values
    return Matching(source=source, target=partner.gather(1, source), kept=kept)


def merge(
    tokens: torch.Tensor, sizes: torch.Tensor, matching: Matching
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the matched tokens, weighted by the number of patches that each stands for.

    Args:
        tokens: `[B, N, C]`.
        sizes: `[B, N]`, 1 for a patch that was never merged.

    Returns:
        Tokens `[B, N - r, C]` (first the kept ones of A, then B) and their sizes `[B, N - r]`.
        The sum of the sizes does not change.
    """
    weight = sizes.to(tokens.dtype)[..., None]
    sums, weights = tokens * weight, weight
    num_targets = tokens.shape[1] // 2
    positions = torch.arange(num_targets, device=tokens.device)
    one_hot = (positions[None, :, None] == matching.target[:, None, :]).to(tokens.dtype)
    merged = sums[:, 1::2] + one_hot @ _take(sums[:, ::2], matching.source)
    merged_weight = weights[:, 1::2] + one_hot @ _take(weights[:, ::2], matching.source)
    kept = _take(tokens[:, ::2], matching.kept)
    kept_weight = _take(weights[:, ::2], matching.kept)
    new_tokens = torch.cat([kept, merged / merged_weight], dim=1)
    return new_tokens, torch.cat([kept_weight, merged_weight], dim=1)[..., 0]


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
