"""What a technique may look at, in front of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vcompress.compress.tokens.pixels import PixelFeature

__all__ = ["AttentionInputs", "View"]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Query and key of the attention of the block before, special tokens included.

    Shapes: B sequences, H heads, M = S + N tokens, D width of a head.

    Attributes:
        query, key: `[B, H, M, D]`, after rotary positions if the model has them.
        scale: the factor on query . key.
        bias: what was added to the scores, `[B, 1, 1, M]`, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None

    def scores(self, rows: slice) -> torch.Tensor:
        """Logits of the queries `rows` over all keys, `[B, H, rows, M]`."""
        scores = (self.query[:, :, rows] * self.scale) @ self.key.transpose(-1, -2)
        return scores if self.bias is None else scores + self.bias


@dataclass(frozen=True, kw_only=True)
class View:
    """The patch tokens in front of a block; special tokens were taken away.

    Shapes: B sequences, N patch tokens, C width, D width of a key, T frames.

    Attributes:
        tokens: `[B, N, C]`.
        sizes: `[B, N]`, how many patches each stands for.
        keys: `[B, N, D]`, what likeness is judged by: keys of the attention before, averaged over
            heads; in front of the first block the tokens themselves.
        attention: of the block before; None in front of the first block.
        num_special: S, leading tokens of `attention`.
        num_frames: T while the tokens are a raster of T frames with N / T places each (frames
            first), None once they are not.
        pixels: `[B, N]` by feature, what each token's pixels are like; those that the section's
            techniques ask for.
        centers: `[P, D]`, what calibration found for this place; None unless the technique is
            fitted.
    """

    tokens: torch.Tensor
    sizes: torch.Tensor
    keys: torch.Tensor
    attention: AttentionInputs | None = None
    num_special: int = 0
    num_frames: int | None = None
    pixels: Mapping[PixelFeature, torch.Tensor] = field(default_factory=dict)
    centers: torch.Tensor | None = None
