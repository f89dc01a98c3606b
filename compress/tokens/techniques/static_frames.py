"""Run-length tokens: a patch that shows what it showed a frame ago is not computed again.

Sources: Run-Length Tokenization (Choudhury et al., 2024, arXiv:2411.05222) and Efficient Video
Sampling (Bagrov et al., 2025, arXiv:2510.14624), written from the papers. The K tokens whose pixels
changed most against the same place one frame earlier stay as they are, position included; the
others leave, and the last token that stayed at their place takes over their size: its run. All of
the first frame stays, so K is at least the places of a frame.
What we changed: a fixed K instead of a threshold, so that the graph is static; all pixels of a
token are compared with all of the one before (Choudhury et al. compare the first frame of one with
the last of the next), so that a change of 0 means the same token but for its position. Only
neighbours in time are compared: a slow drift is seen only as far as K leaves room for it.

The ranking is one sort of all N tokens and one of those that stay.

Shapes: B sequences, N = T L tokens in T frames of L places, K tokens that stay.
"""

from __future__ import annotations

import torch

from vcompress.compress.tokens.ranking import ascending, descending
from vcompress.compress.tokens.reduction import Reduction

__all__ = ["reduce"]

# Among equal changes (still pictures have nothing else) the earlier token stays, on every runtime.
# Far below a step of 8 bits even for the last of 10^5 tokens.
_TIE_BREAK = 1e-9


def reduce(change: torch.Tensor, num_frames: int, keep: int) -> Reduction:
    """Keep the `keep` tokens that changed most, and all of the first frame.

    Args:
        change: `[B, T L]`, frames first; what stands for the first frame does not matter.
        num_frames: T.
        keep: K, at least L and at most T L.
    """
    num_tokens = change.shape[1]
    places = num_tokens // num_frames
    assert places <= keep <= num_tokens
    index = torch.arange(num_tokens, device=change.device)
    raster = torch.unflatten(change.float() - _TIE_BREAK * index, 1, (num_frames, places))
    first = raster.amax(dim=(1, 2), keepdim=True) + 1
    scores = torch.cat([first.expand(-1, 1, places), raster[:, 1:]], dim=1)
    # Counted place by place, the last token that stayed before another one is of its place: every
    # place begins with the first frame.
    order = descending(scores.transpose(1, 2).flatten(1))
    kept, source = ascending(order[:, :keep]), order[:, keep:]
    target = (kept[:, None, :] <= source[:, :, None]).sum(dim=-1) - 1
    to_raster = index.view(num_frames, places).t().reshape(-1)
    kept, source = (
        to_raster.index_select(0, part.reshape(-1)).view_as(part) for part in (kept, source)
    )
    return Reduction(
        kept=kept, source=source, target=target, num_receivers=keep,
        value_share=0.0, size_share=1.0,
    )  # fmt: skip
