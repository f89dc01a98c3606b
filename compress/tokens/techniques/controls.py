"""Controls: reductions that a technique has to beat to be worth anything.

Source: the controls of Pollard and Wray, 2025, arXiv:2506.03885, written from the paper. `drop`
matches as `bipartite` does, but those that would merge leave; what it loses against merging is what
merging is worth. `random` averages tokens that have nothing to do with each other: it stands for a
wrong index.
`drop_places` does to whole places, in all frames alike, what `drop` does to tokens.
What we changed: `random` draws its indices once, from a fixed seed, and they are constants of the
graph; any token may be a source.

Shapes: B sequences, N tokens, K tokens that are kept, D width of a key, r tokens that leave.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vcompress.calib.clips import permutation
from vcompress.compress.tokens.reduction import Reduction
from vcompress.compress.tokens.techniques import bipartite, places

__all__ = ["drop", "drop_places", "random"]

_SEED = 0


def drop(keys: torch.Tensor, merges: int) -> Reduction:
    """Drop the `merges` tokens of A that are most like a token of B; arguments as `match` has."""
    return replace(bipartite.match(keys, merges), value_share=0.0, size_share=0.0)


def drop_places(keys: torch.Tensor, num_frames: int, merges: int) -> Reduction:
    """Drop the `merges` places that are most like another one; arguments as of `places.match`."""
    return replace(places.match(keys, num_frames, merges), value_share=0.0, size_share=0.0)


def random(like: torch.Tensor, keep: int) -> Reduction:
    """Average tokens at random until `keep` are left.

    Args:
        like: tokens `[B, N, C]`; only their shape and device count.
        keep: K, at least 1.
    """
    order = permutation(like.shape[1], _SEED)
    kept, source = sorted(order[:keep]), order[keep:]
    target = [place % keep for place in permutation(len(source), _SEED + 1)]
    kept_index, source_index, target_index = (
        torch.tensor(index, dtype=torch.int64, device=like.device).expand(like.shape[0], -1)
        for index in (kept, source, target)
    )
    return Reduction(kept=kept_index, source=source_index, target=target_index, num_receivers=keep)
