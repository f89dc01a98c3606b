"""How the tokens of a block's input lie, and how techniques see them.

Techniques see `[B', N, C]`: B' sequences of N patch tokens, frames first. See `TokenGrid` for what
blocks take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.models.video import TokenGrid

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Between a block's input and the patch tokens that techniques see."""

    grid: TokenGrid

    @property
    def sequences_per_clip(self) -> int:
        """How many sequences a technique sees of each clip."""
        return self.grid.frames if self.grid.arrangement == "frames" else 1

    @property
    def num_frames(self) -> int:
        """Frames in the raster of one sequence."""
        return 1 if self.grid.arrangement == "frames" else self.grid.frames

    @property
    def needs_all_frames_alike(self) -> bool:
        """Whether every frame has to keep the same places, and all frames have to stay."""
        return self.grid.arrangement in ("tubes", "divided")

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's input to special tokens (as they came, maybe none) and patches `[B', N, C]`."""
        special, patches = x[:, : self.grid.special], x[:, self.grid.special :]
        if self.grid.arrangement == "tubes":
            patches = patches.reshape(-1, self.grid.frames * patches.shape[1], x.shape[-1])
        elif self.grid.arrangement == "divided":
            patches = _swapped(patches, patches.shape[1] // self.grid.frames)
        return special, patches

    def join(self, special: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        if self.grid.arrangement == "tubes":
            places = patches.shape[1] // self.grid.frames
            patches = patches.reshape(-1, places, patches.shape[-1])
        elif self.grid.arrangement == "divided":
            patches = _swapped(patches, self.grid.frames)
        return torch.cat([special, patches], dim=1) if self.grid.special else patches

    def split_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys of a block's attention (over space) `[B'', S + L, D]` to `[B', N, D]`."""
        patches = keys[:, self.grid.special :]
        if self.needs_all_frames_alike:
            patches = patches.reshape(-1, self.grid.frames * patches.shape[1], keys.shape[-1])
        return patches

    def spread_sizes(self, sizes: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Sizes `[B', N]` for an attention over `num_keys` keys, special ones at 1.

        These are all tokens of a sequence, or those of one frame.
        """
        sizes = sizes.reshape(-1, num_keys - self.grid.special)
        if not self.grid.special:
            return sizes
        return torch.cat([torch.ones_like(sizes[:, :1]).expand(-1, self.grid.special), sizes], 1)


def _swapped(patches: torch.Tensor, first: int) -> torch.Tensor:
    """`[B, first * second, C]` to `[B, second * first, C]`."""
    num_sequences, num_tokens, width = patches.shape
    raster = patches.reshape(num_sequences, first, num_tokens // first, width)
    return raster.transpose(1, 2).reshape(num_sequences, num_tokens, width)
