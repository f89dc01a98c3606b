"""Energy-guarded merging: only tokens of large clusters are merged, the rare ones are protected.

Source: PiToMe (Tran et al., 2024, arXiv:2405.16148), written from the paper. The energy of a token
is the mean of ELU(cosine - margin) to all tokens: high amid many that are like it. The 2r most
energetic, in this order, go to A and B in turn, and each of A joins its best in B.
What we changed: the paper lowers the margin with depth, which a technique does not know; here it is
the mean cosine of the sequence, which measures what that schedule anticipates.

All N x N likenesses are computed, 4 times what `bipartite` needs. The ranking is one sort of
all N tokens.

Shapes: B sequences, N tokens, D width of a key, r tokens that are merged.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vcompress.compress.tokens.decisions import most_alike_of
from vcompress.compress.tokens.ranking import descending
from vcompress.compress.tokens.reduction import Reduction, take

__all__ = ["energy", "match"]


def energy(keys: torch.Tensor, margin: float | None = None) -> torch.Tensor:
    """How much each token of `[B, N, D]` is like all others: `[B, N]`.

    Args:
        keys: need no length.
        margin: cosine from which on a token counts as alike; the mean of the sequence if None.
    """
    unit = functional.normalize(keys.float(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    level = cosine.mean(dim=(1, 2), keepdim=True) if margin is None else margin
    return functional.elu(cosine - level).mean(dim=-1)


def match(keys: torch.Tensor, merges: int, margin: float | None = None) -> Reduction:
    """Merge `merges` of the 2 `merges` most energetic tokens into the others of them.

    Args:
        keys: `[B, N, D]`.
        merges: r, at most floor(N/2).
        margin: see `energy`.
    """
    order = descending(energy(keys, margin))
    mergeable, protected = order[:, : 2 * merges], order[:, 2 * merges :]
    a_index, b_index = mergeable[:, ::2], mergeable[:, 1::2]
    a, b = (functional.normalize(take(keys, index).float(), dim=-1) for index in (a_index, b_index))
    return Reduction(
        kept=torch.cat([protected, b_index], dim=1),
        source=a_index,
        target=most_alike_of(a @ b.transpose(1, 2)),
        num_receivers=merges,
    )
