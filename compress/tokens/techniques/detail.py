"""Flat patches merged before the model: what shows nothing needs few tokens.

Sources: patches are measured before they are embedded, as in Adaptive Patch Transformers (Choudhury
et al., 2025, arXiv:2510.18091), which give flat areas larger patches; what is protected, what
receives and what leaves, as in PiToMe (Tran et al., 2024, arXiv:2405.16148). Written from the
papers.
What we changed: the patches stay as they are, since the model knows one size of them. The measure
is the standard deviation of a token's pixels. The tokens with most detail stay untouched; of the
flat ones some stay, at equal distances in the raster, and take the others in, each the most alike.
A third of what is kept is flat: fewer lose what the model reads off the background, more lose
detail (measured on PenVideo-20). A fixed number stays, so that the graph is static.

The ranking is one sort of all N tokens and one of the flat ones.

Shapes: B sequences, N tokens, K tokens that stay, D width of a key.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vcompress.compress.tokens.decisions import most_alike_of
from vcompress.compress.tokens.ranking import ascending, descending
from vcompress.compress.tokens.reduction import Reduction, take

__all__ = ["num_flat", "reduce"]

_FLAT_SHARE = 1 / 3
# Of the clip's largest: less is rounding, which runtimes do not share.
_LEAST_DETAIL = 1e-4
# Among equals (empty patches have nothing else) the earlier counts for more, on every runtime; not
# more than the least detail even for the last of 10^5 tokens.
_TIE_BREAK = 1e-9


def num_flat(keep: int) -> int:
    """How many of `keep` tokens are flat ones that take in the others."""
    return max(1, round(_FLAT_SHARE * keep))


def reduce(detail: torch.Tensor, keys: torch.Tensor, keep: int) -> Reduction:
    """Keep the tokens with most detail, and a few of the others, which the rest joins.

    Args:
        detail: `[B, N]`, frames first.
        keys: `[B, N, D]`; each that leaves joins the flat one that is most like it, by cosine.
        keep: K, from 1 to N - 1.
    """
    num_tokens, receiving = detail.shape[1], num_flat(keep)
    places = torch.arange(num_tokens, device=detail.device)
    scaled = detail.float() / detail.float().amax(dim=1, keepdim=True).clamp(min=1e-12)
    order = descending(torch.where(scaled < _LEAST_DETAIL, 0.0, scaled) - _TIE_BREAK * places)
    detailed, flat = order[:, : keep - receiving], ascending(order[:, keep - receiving :])
    slots = [(2 * slot + 1) * flat.shape[1] // (2 * receiving) for slot in range(receiving)]
    others = sorted(set(range(flat.shape[1])) - set(slots))
    receivers, source = (
        flat.index_select(1, torch.tensor(chosen, device=flat.device)) for chosen in (slots, others)
    )
    unit = functional.normalize(keys.float(), dim=-1)
    likeness = take(unit, source) @ take(unit, receivers).transpose(1, 2)
    return Reduction(
        kept=torch.cat([detailed, receivers], dim=1), source=source,
        target=most_alike_of(likeness), num_receivers=receiving,
    )  # fmt: skip
