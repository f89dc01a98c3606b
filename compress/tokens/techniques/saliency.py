"""Saliency-aware merging: what the background says is forgotten, what the foreground says is kept.

Source: vid-TLDR (Choi et al., 2024, arXiv:2403.13347), written from the paper. A token whose
attention is sharp lies on something; one that attends to everything alike is background. Tokens
are matched as in `bipartite`, but a token that joins another one counts, in value and in size, by
its saliency: background leaves nothing behind. So sizes do not sum to the number of patches.
What we changed: where all tokens attend equally sharply there is no background, and all count; a
reduction below half of the tokens repeats the matching, which carries saliency along.

The whole attention map of the block before is computed once more, without a fused kernel, so a
place costs about an attention of its own. The ranking is one sort of N / 2 tokens.

Shapes: B sequences, H heads, M = S + N tokens of the attention, N patch tokens, C width,
r tokens that are merged.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vcompress.compress.tokens.reduction import Reduction
from vcompress.compress.tokens.techniques import bipartite
from vcompress.compress.tokens.view import AttentionInputs

__all__ = ["match", "saliency", "sharpness"]

# Sharpness in nats that differs by less is rounding, not foreground and background.
_LEAST_SPREAD = 1e-4
_LEAST_PROBABILITY = 1e-12


def sharpness(attention: AttentionInputs, num_special: int) -> torch.Tensor:
    """Negative entropy of the attention of each patch token, averaged over heads first: `[B, N]`.

    Args:
        attention: of the block before.
        num_special: S, tokens that are attended to but not judged.
    """
    attended = attention.scores(slice(num_special, None)).float().softmax(dim=-1).mean(dim=1)
    return (attended * attended.clamp(min=_LEAST_PROBABILITY).log()).sum(dim=-1)


def saliency(sharpness: torch.Tensor) -> torch.Tensor:
    """Sharpness `[B, N]` to saliency: 0 at the mean and below, 1 at the largest.

    The paper scales to 0..1 first, which cancels out.
    """
    above = sharpness - sharpness.mean(dim=1, keepdim=True)
    highest = above.amax(dim=1, keepdim=True)
    scaled = above.clamp(min=0) / highest.clamp(min=_LEAST_SPREAD)
    return torch.where(highest < _LEAST_SPREAD, torch.ones_like(scaled), scaled)


def match(tokens: torch.Tensor, salient: torch.Tensor, merges: int) -> Reduction:
    """Merge `merges` tokens of A into B, each weighed by its saliency.

    Args:
        tokens: `[B, N, C]`; the paper compares tokens rather than keys.
        salient: `[B, N]` in [0, 1].
        merges: r, at most floor(N/2).
    """
    matching = bipartite.match(tokens, merges)
    weight = salient.gather(1, matching.source)
    return replace(matching, value_share=weight, size_share=weight)
