"""Frame merging by vote: whole frames that show the same become one.

Source: the temporal aggregation of TESTA (Ren et al., 2023, arXiv:2310.19060), written from the
paper. At each place tokens are matched over time as in `bipartite`; the places vote for one partner
for the whole frame, and the frames that are most like theirs join it, all places at once.
What we changed: the paper takes the most frequent index and the most frequent score; here a frame's
score is the mean likeness of its places to the elected partner, since floats are rarely equal. Of
equal partners the nearest in time is taken. The frames that are left stay in the order of time.

The rankings sort T / 2 and T - r frames.

Shapes: B sequences, T frames, K of them kept, r that leave, L places, C width, D width of a key.
Frames at even times form the set A, at odd times the set B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from vcompress.compress.tokens.decisions import most_alike_of
from vcompress.compress.tokens.ranking import ascending, descending
from vcompress.compress.tokens.reduction import Reduction, take

__all__ = ["WholeFrames", "match"]

# Above rounding, far below differences that mean anything.
_NEARNESS = 1e-5
# Mean likeness, in [-1, 1], may only decide between equal numbers of votes.
_LESS_THAN_A_VOTE = 0.25


@dataclass(frozen=True, kw_only=True)
class WholeFrames:
    """Some frames of `[B, T L, C]` stay; the others join one of them.

    Attributes:
        kept: `[B, K]` int64, times in ascending order.
        source: `[B, r]` int64, times.
        target: `[B, r]` int64, which of `kept` each joins.
        num_places: L.
        averages: whether tokens are averaged; if not, only sizes are taken over.
    """

    kept: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    num_places: int
    averages: bool = True

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reducer`. A frame that nothing joins does not change by a bit."""
        frames, weights = self._frames(tokens), self._frames(sizes)
        left, own, moving = (
            take(frames, self.kept), take(weights, self.kept), take(weights, self.source),
        )  # fmt: skip
        receivers = torch.arange(self.kept.shape[1], device=tokens.device)
        joins = (receivers[None, :, None] == self.target[:, None, :]).to(sizes.dtype)
        grown = own + joins @ moving
        if self.averages:
            width = tokens.shape[-1]
            shares = self._places(moving, 1) * self._places(take(frames, self.source), width)
            joined = self._places(joins.to(shares.dtype) @ shares.flatten(2), width)
            own_shares = self._places(own, 1)
            merged = (self._places(left, width) + joined / own_shares) / (
                self._places(grown, 1) / own_shares
            )
            left = merged.to(tokens.dtype).flatten(2)
        return self._places(left, tokens.shape[-1]).flatten(1, 2), grown.flatten(1)

    def destination(self) -> torch.Tensor:
        """See `Reducer`."""
        first = self._of_frames().destination()[..., None] * self.num_places
        return (first + torch.arange(self.num_places, device=first.device)).flatten(1)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reducer`."""
        restored = self._of_frames().restore(self._frames(tokens))
        return self._places(restored, tokens.shape[-1]).flatten(1, 2)

    def _of_frames(self) -> Reduction:
        return Reduction(
            kept=self.kept, source=self.source, target=self.target,
            num_receivers=self.kept.shape[1],
        )  # fmt: skip

    def _frames(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T L, ...]` to a row for every frame, `[B, T, L ...]`."""
        return x.reshape(x.shape[0], x.shape[1] // self.num_places, -1)

    def _places(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """A row for every frame to `[B, T, L, width]`."""
        return torch.unflatten(rows, 2, (self.num_places, width))


def match(keys: torch.Tensor, num_frames: int, merges: int) -> WholeFrames:
    """Merge the `merges` frames at even times that are most like one at an odd time.

    Args:
        keys: `[B, T L, D]`, frames first.
        num_frames: T.
        merges: r, at most floor(T/2).
    """
    unit = functional.normalize(keys.float(), dim=-1)
    unit = torch.unflatten(unit, 1, (num_frames, -1))
    even = torch.arange(0, num_frames, 2, device=keys.device)
    odd = torch.arange(1, num_frames, 2, device=keys.device)
    # [B, L, |A|, |B|]
    likeness = unit[:, ::2].transpose(1, 2) @ unit[:, 1::2].permute(0, 2, 3, 1)
    likeness = likeness - _NEARNESS * (even[:, None] - odd[None, :]).abs()
    ballots = most_alike_of(likeness)[..., None] == torch.arange(len(odd), device=keys.device)
    mean = likeness.mean(dim=1)
    partner = most_alike_of(ballots.float().sum(dim=1) + _LESS_THAN_A_VOTE * mean)
    order = descending(mean.gather(2, partner[..., None])[..., 0])
    source, stays = order[:, :merges], order[:, merges:]
    both = torch.cat([2 * stays, odd.expand(keys.shape[0], -1)], dim=1)
    kept = ascending(both)
    elected = 2 * partner.gather(1, source) + 1
    return WholeFrames(
        kept=kept,
        source=2 * source,
        target=(kept[:, None, :] < elected[:, :, None]).sum(dim=-1),
        num_places=keys.shape[1] // num_frames,
    )
