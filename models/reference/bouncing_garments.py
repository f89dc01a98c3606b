"""Bouncing Garments: a real garment crosses a black field and bounces off its walls.

What: 16 frames of 48x48, gray. A prompt names the garment (10), the direction in which it starts
(8) and its speed (1 or 2 pixels a frame along each axis that it moves on): 160 prompts. Nothing
else moves, so what a generated clip should show can be computed: the class by a classifier, the
path by its centre.
Source: Fashion-MNIST photographs (Xiao et al., 2017, arXiv:1708.07747, MIT, see NOTICE) moved in
the manner of Moving MNIST (Srivastava et al., 2015, arXiv:1502.04681). Differences: positions are
whole pixels, one object, and no bounce within the first 4 frames, so that they tell the direction.

Shapes: N clips, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.models.reference.moving_fashion import (
    DIRECTIONS,
    GARMENT_SIZE,
    GARMENTS,
    Garments,
)
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = [
    "DIRECTIONS", "GARMENTS", "GARMENT_SIZE", "NUM_FRAMES", "NUM_TOKENS", "SIZE", "SPEEDS",
    "TOKEN_WIDTH", "Prompt", "draw", "embed", "path", "render",
]  # fmt: skip

NUM_FRAMES = 16
SIZE = 48
SPEEDS = ("slow", "fast")  # 1 and 2 pixels a frame
NUM_TOKENS = 3
TOKEN_WIDTH = 32
_STEADY_FRAMES = 4  # no bounce before
_ROOM = SIZE - GARMENT_SIZE
# (y, x), in the order of DIRECTIONS; y points down, so S is +1.
_UNITS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
_FIRST_TOKEN = (0, len(GARMENTS), len(GARMENTS) + len(DIRECTIONS))
_NO_PROMPT = len(GARMENTS) + len(DIRECTIONS) + len(SPEEDS)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a clip shows: names from `GARMENTS`, `DIRECTIONS` and `SPEEDS`."""

    garment: str
    direction: str
    speed: str

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """Read "sneaker, NE, fast".

        Raises:
            InputError: a part is missing or unknown.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != NUM_TOKENS:
            message = (
                f"a prompt is 'garment, direction, speed', three parts; {text!r} has {len(parts)}; "
                "write for instance 'sneaker, NE, fast'"
            )
            raise InputError(message)
        for part, known in zip(parts, (GARMENTS, DIRECTIONS, SPEEDS), strict=True):
            if part not in known:
                message = (
                    f"the prompt {text!r} holds {part!r}; there are: {', '.join(known)}"
                    f"{nearest(part, known)}"
                )
                raise InputError(message)
        return cls(garment=parts[0], direction=parts[1], speed=parts[2])

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        return f"{self.garment}, {self.direction}, {self.speed}"

    @property
    def label(self) -> tuple[int, int, int]:
        """Indices of garment, direction and speed."""
        return (
            GARMENTS.index(self.garment),
            DIRECTIONS.index(self.direction),
            SPEEDS.index(self.speed),
        )


def embed(labels: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
    """Prompt embeddings `[N, 3, 32]` of `labels` `[N, 3]` (garment, direction, speed).

    One-hot rows: the transformer's own text projection learns what they mean. Where `dropped`
    `[N]` is true all three tokens are the one of "no prompt", for classifier-free guidance.
    """
    tokens = labels + torch.tensor(_FIRST_TOKEN)
    if dropped is not None:
        tokens = torch.where(dropped[:, None], _NO_PROMPT, tokens)
    return torch.nn.functional.one_hot(tokens, TOKEN_WIDTH).float()


def path(starts: torch.Tensor, labels: torch.Tensor, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """Top-left corners `[N, T, 2]` (y, x) of garments that start at `starts` `[N, 2]`, bouncing."""
    velocity = torch.tensor(_UNITS)[labels[:, 1]] * (labels[:, 2:] + 1)
    free = starts[:, None] + velocity[:, None] * torch.arange(num_frames)[None, :, None]
    return _ROOM - (free % (2 * _ROOM) - _ROOM).abs()


def render(images: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Clips `[N, T, 48, 48]` of `images` `[N, 28, 28]` with their corners at `corners`."""
    field = torch.arange(SIZE)
    y, x = (field - corners[..., axis, None] for axis in (0, 1))
    clip = torch.arange(len(images))[:, None, None, None]
    last = GARMENT_SIZE - 1
    pixels = images[clip, y.clamp(0, last)[..., :, None], x.clamp(0, last)[..., None, :]]
    inside = [(offset >= 0) & (offset <= last) for offset in (y, x)]
    return pixels * (inside[0][..., :, None] & inside[1][..., None, :])


def draw(
    garments: Garments, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw clips `[N, T, H, W]` uint8, labels `[N, 3]` and paths `[N, T, 2]` from `generator`."""
    chosen = torch.randint(len(garments.images), (count,), generator=generator)
    directions = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    speeds = torch.randint(len(SPEEDS), (count,), generator=generator)
    kinds = torch.from_numpy(garments.kinds.copy()).long()[chosen]
    labels = torch.stack([kinds, directions, speeds], 1)
    travel = torch.tensor(_UNITS)[directions] * (speeds[:, None] + 1) * (_STEADY_FRAMES - 1)
    low, high = (-travel).clamp(min=0), _ROOM - travel.clamp(min=0)
    share = torch.rand(count, 2, generator=generator)
    starts = low + (share * (high - low + 1)).long()
    corners = path(starts, labels)
    images = torch.from_numpy(garments.images[chosen.numpy()])
    return render(images, corners), labels, corners
