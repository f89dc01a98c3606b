"""Models of the sizes of real ones, with random weights: for time and memory, never for quality.

Wan-1.3B and CogVideoX-2B at 480p, and a ViT-L over clips of 16 frames at 224 x 224.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

__all__ = ["SHAPES", "Shape", "Transformer", "tiny"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a transformer; `context` tokens of text are attended to across, 0 for none."""

    name: str
    width: int
    depth: int
    heads: int
    hidden: int
    tokens: int
    context: int
    batch: int
    steps: int


SHAPES = {
    each.name: each
    for each in (
        # 81 frames of 480 x 832: 21 x 30 x 52 tokens.
        Shape(name="wan-1.3b", width=1536, depth=30, heads=12, hidden=8960, tokens=32760,
              context=512, batch=1, steps=10),
        # 49 frames of 480 x 720: 13 x 30 x 45 tokens, and 226 of text beside them.
        Shape(name="cogvideox-2b", width=1920, depth=30, heads=30, hidden=7680, tokens=17776,
              context=0, batch=1, steps=10),
        Shape(name="vit-l", width=1024, depth=24, heads=16, hidden=4096, tokens=1568, context=0,
              batch=8, steps=1),
    )
}  # fmt: skip


def tiny(shape: Shape) -> Shape:
    """The same form in sizes that a CPU runs at once."""
    return replace(
        shape, width=64, depth=2, heads=2, hidden=128, tokens=48, batch=1,
        context=16 if shape.context else 0, steps=min(shape.steps, 4),
    )  # fmt: skip


class Attention(nn.Module):
    """Self attention, or attention to `context`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, L, C]` and `[B, S, C]` to `[B, L, C]`."""
        parts = self.query(x), self.key(context), self.value(context)
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(*split)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, attention to text where there is one, and two linears."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(3))
        self.own = Attention(shape.width, shape.heads)
        self.cross = Attention(shape.width, shape.heads) if shape.context else None
        self.grow = nn.Linear(shape.width, shape.hidden)
        self.shrink = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Tokens `[B, L, C]` to the same."""
        own = self.norms[0](x)
        x = x + self.own(own, own)
        if self.cross is not None and context is not None:
            x = x + self.cross(self.norms[1](x), context)
        return x + self.shrink(functional.gelu(self.grow(self.norms[2](x)), approximate="tanh"))


class Transformer(nn.Module):
    """The blocks of a model, which take nearly all of its time."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))

    def example(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Tokens, and text where there is one."""
        shape = self.shape
        sizes = [shape.tokens, *([shape.context] if shape.context else [])]
        return tuple(
            torch.randn(shape.batch, size, shape.width, device=device, dtype=dtype)
            for size in sizes
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens `[B, L, C]` to the same."""
        for block in self.blocks:
            x = block(x, context)
        return x
