"""V-JEPA 2: rotary positions, which every attention computes anew from the place in the sequence.

After a reduction that place means nothing. So each token carries its position, a merged one the
mean of its patches' positions, weighted by size like the token itself: the rotation takes any real
number. Averaging the rotations would shrink queries and keys. ToMe's author suggests the same in
github.com/dbolya/tomesd/issues/59.

Shapes: B clips, N tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.families.base import Family
from vcompress.models.video import VideoModel

__all__ = ["VJEPA2"]


@dataclass
class _CarriedPositions:
    """In place of an attention's `get_position_ids`.

    An object that holds nothing but the state: a deep copy of the model copies it with the state.
    """

    state: TokenState

    def __call__(
        self, hidden: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Frame, row and column `[B, 1, N]` of the tokens `hidden` `[B, N, C]`."""
        assert masks is None, "only the predictor masks, and it keeps its own positions"
        positions = self.state.positions_of(hidden)
        assert positions is not None
        positions = positions.to(hidden.dtype)
        return tuple(positions[:, None, :, axis] for axis in range(3))


def _prepare(model: VideoModel, state: TokenState) -> None:
    """Let the attention of every block take its positions from `state`."""
    assert model.token_grid is not None
    attentions: list[Any] = [model.layer(f"{name}.attention") for name in model.token_blocks]
    # As the model itself counts them, whatever the size of the clip.
    example = torch.empty(1, model.token_grid.num_patches, 1)
    raster = [axis.float() for axis in attentions[0].get_position_ids(example)]
    state.first_positions = torch.stack(raster, dim=-1)[None]
    for attention in attentions:
        attention.get_position_ids = _CarriedPositions(state)


VJEPA2 = Family(prepare=_prepare)
