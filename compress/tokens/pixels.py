"""What techniques may read off the pixels of each token, before the model has seen them.

Shapes: B clips, T x h x w tokens, N = T h w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch

from vcompress.models.video import TokenGrid
from vcompress.spec import clip

__all__ = ["PIXEL_FEATURES", "PixelFeature", "pixels_change", "pixels_detail"]

PixelFeature = Literal["change", "detail"]

_TO_NTCHW = {"NTCHW": (0, 1, 2, 3, 4), "NCTHW": (0, 2, 1, 3, 4), "NTHWC": (0, 1, 4, 2, 3)}


def pixels_change(clips: torch.Tensor, layout: clip.Layout, grid: TokenGrid) -> torch.Tensor:
    """Mean absolute difference of each token's pixels to those of the token one frame earlier.

    Args:
        clips: model inputs, their axes in the order of `layout`.
        layout: of `clips`.
        grid: into which tokens the model cuts them.

    Returns:
        `[B, N]`, frames first; 0 in the first frame.
    """
    tubes = _tubes(clips, layout, grid).flatten(2, 3)
    change = (tubes[:, 1:] - tubes[:, :-1]).abs().mean(dim=(2, 4, 6)).flatten(1)
    first = torch.zeros_like(change[:, :1]).expand(-1, grid.height * grid.width)
    return torch.cat([first, change], dim=1)


def pixels_detail(clips: torch.Tensor, layout: clip.Layout, grid: TokenGrid) -> torch.Tensor:
    """Standard deviation of each token's pixels, averaged over the channels: `[B, N]`.

    0 for a patch of one colour that stays. Arguments as of `pixels_change`.
    """
    tubes = _tubes(clips, layout, grid)
    around = tubes - tubes.mean(dim=(2, 5, 7), keepdim=True)
    return around.square().mean(dim=(2, 5, 7)).sqrt().mean(dim=2).flatten(1)


PIXEL_FEATURES: Mapping[
    PixelFeature, Callable[[torch.Tensor, clip.Layout, TokenGrid], torch.Tensor]
] = MappingProxyType({"change": pixels_change, "detail": pixels_detail})


def _tubes(clips: torch.Tensor, layout: clip.Layout, grid: TokenGrid) -> torch.Tensor:
    """Clips as `[B, T, frames of a token, channels, h, rows, w, columns]`, float32.

    Pixels and frames that fill no patch are left out.
    """
    frames = clips.permute(_TO_NTCHW[layout]).float()
    depth = frames.shape[1] // grid.frames
    rows, columns = frames.shape[-2] // grid.height, frames.shape[-1] // grid.width
    frames = frames[:, : grid.frames * depth, :, : grid.height * rows, : grid.width * columns]
    return frames.reshape(
        -1, grid.frames, depth, frames.shape[2], grid.height, rows, grid.width, columns
    )
