"""Grouped dropping: tokens that the summary of the clip does not attend to leave.

Source: IA-RED^2 (Pan et al., 2021, arXiv:2106.12620), written from the paper, whose network trains
an interpreter for each group of blocks that scores patches against the class token.
What we changed: nothing is trained. The score is the attention of the class token in the block
before, averaged over heads; models without special tokens are asked with the mean of all queries.
A fixed number stays. While the tokens are a raster, every frame keeps the same number, floor(K/T),
so that no moment is lost; what is over goes to the best of the rest.

What leaves is lost, sizes do not sum to the number of patches. One row of attention is computed.
The ranking sorts the places of each frame and, if K is no multiple of T, the rest; without a
raster, all N tokens.

Shapes: B sequences, M = S + N tokens of the attention, N patch tokens in T frames, D width of a
key, K tokens that stay.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vcompress.compress.tokens.decisions import most_alike_of
from vcompress.compress.tokens.ranking import descending
from vcompress.compress.tokens.reduction import Reduction, take
from vcompress.compress.tokens.view import AttentionInputs

__all__ = ["attention_received", "reduce"]


def attention_received(attention: AttentionInputs, num_special: int) -> torch.Tensor:
    """What the first special token, or else the mean query, gives each patch token: `[B, N]`."""
    query = attention.query
    asking = query[:, :, :1] if num_special else query.mean(dim=2, keepdim=True)
    scores = (asking * attention.scale) @ attention.key.transpose(-1, -2)
    if attention.bias is not None:
        scores = scores + attention.bias
    return scores.float().softmax(dim=-1).mean(dim=1)[:, 0, num_special:]


def reduce(scores: torch.Tensor, keys: torch.Tensor, num_frames: int, keep: int) -> Reduction:
    """Keep the `keep` tokens of highest score, as many in each frame as divide evenly.

    Args:
        scores: `[B, N]`, frames first.
        keys: `[B, N, D]`; a restored token gets the value of the kept one that is most like it.
        num_frames: T; 1 for tokens that are no raster.
        keep: K.
    """
    places = scores.shape[1] // num_frames
    evenly, over = divmod(keep, num_frames)
    of_frame = torch.unflatten(scores, 1, (num_frames, places))
    best = descending(of_frame)
    first = torch.arange(num_frames, device=scores.device)[:, None] * places
    order = best + first
    kept, rest = order[..., :evenly].flatten(1), order[..., evenly:].flatten(1)
    if over:
        rest = rest.gather(1, descending(scores.gather(1, rest)))
        kept, rest = torch.cat([kept, rest[:, :over]], dim=1), rest[:, over:]
    unit = functional.normalize(keys.float(), dim=-1)
    likeness = take(unit, rest) @ take(unit, kept).transpose(1, 2)
    return Reduction(
        kept=kept, source=rest, target=most_alike_of(likeness), num_receivers=keep,
        value_share=0.0, size_share=0.0,
    )  # fmt: skip
