"""Merging that leaves every frame the same places, for models that attend along time at a place.

Source: bipartite soft matching (Bolya et al., 2022, arXiv:2210.09461), written from the paper.
What we changed: there is one matching for all frames, over places; two places are as alike as they
are on average over the frames (mean of the cosines). In models with divided or factorised attention
a matching of each frame for itself would tear apart what a place means from frame to frame.

Each frame averages by its own sizes. The ranking is one sort of L / 2 places.

Shapes: B sequences, T frames, L places, D width of a key, r places that are merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from vcompress.compress.tokens.reduction import Reducer, Reduction
from vcompress.compress.tokens.techniques import bipartite

__all__ = ["InEveryFrame", "match"]


@dataclass(frozen=True, kw_only=True)
class InEveryFrame:
    """Does in every frame of `[B, T L, C]` the same.

    Attributes:
        places: a reduction of `[B T, L, C]`, alike in the T frames of a sequence.
        num_frames: T.
        num_left: places that `places` leaves.
    """

    places: Reducer
    num_frames: int
    num_left: int

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reducer`."""
        merged, grown = self.places.apply(self._frames(tokens), self._frames(sizes))
        return self._joined(merged), self._joined(grown)

    def destination(self) -> torch.Tensor:
        """See `Reducer`."""
        places = torch.unflatten(self.places.destination(), 0, (-1, self.num_frames))
        first = torch.arange(self.num_frames, device=places.device)[:, None] * self.num_left
        return torch.where(places >= 0, places + first, places).flatten(1)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reducer`."""
        return self._joined(self.places.restore(self._frames(tokens)))

    def _frames(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[1] // self.num_frames, *x.shape[2:])

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.num_frames * x.shape[1], *x.shape[2:])


def match(keys: torch.Tensor, num_frames: int, merges: int) -> Reduction:
    """Merge the `merges` places that are most like another one, the same in all frames.

    Args:
        keys: `[B T, L, D]`.
        num_frames: T.
        merges: r, at most floor(L/2).

    Returns:
        Of `[B T, L, C]`.
    """
    unit = functional.normalize(keys.float(), dim=-1)
    # The product of the unit keys of all frames, one after the other, is the sum of the cosines.
    frames = torch.unflatten(unit, 0, (-1, num_frames)).transpose(1, 2).flatten(2)
    shared = bipartite.match(frames, merges)
    kept, source, target = (
        index[:, None].expand(-1, num_frames, -1).flatten(0, 1)
        for index in (shared.kept, shared.source, shared.target)
    )
    return Reduction(kept=kept, source=source, target=target, num_receivers=shared.num_receivers)
