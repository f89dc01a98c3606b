"""Merge tokens inside windows of a video's raster, and put them back.

Sources: one token of each cell of the raster receives, the others may join one, as in token merging
for diffusion (Bolya and Hoffman, 2023, arXiv:2303.17604); likeness by Euclidean distance, as in
asymmetric reduction (Sun et al., 2024, arXiv:2412.11706); matching inside windows, as in token
merge with attention (Lu et al., 2025, arXiv:2509.10918). Written from the papers.
What we changed: receivers stand at fixed places rather than at random ones, so that a graph stays
the same from run to run; every window of one shape keeps the same number of tokens, so the matching
costs N x window rather than N x N, sorting sees one window alone, and all shapes are integers. Axes
that a window does not divide are cut into windows that differ in length by at most one.

Shapes: R rows (sequences x heads), N = frames x height x width tokens, K tokens that are kept,
C width. "Window order" is window after window, those of one shape together, in each the tokens
that may join first and the receivers last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.tokens.reduction import Reduction
from vcompress.compress.tokens.techniques.bipartite import most_alike

__all__ = ["Box", "Distance", "GridWindows", "WindowReduction"]

# Frames, height and width, in tokens.
Box = tuple[int, int, int]
Distance = Literal["euclidean", "cosine"]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Windows of one shape."""

    num_windows: int
    num_joining: int
    num_receivers: int

    @property
    def size(self) -> int:
        """Tokens of a window."""
        return self.num_joining + self.num_receivers

    def kept(self, share: float) -> int:
        """Tokens of a window that are left of it at `share`."""
        return min(self.size, max(self.num_receivers, int(share * self.size + 0.5)))


class GridWindows(nn.Module):
    """The windows of a raster of `grid` (frames, height, width) tokens, frames first.

    A module for the sake of its two index tensors, which move with the model and are no part of
    its state.

    Args:
        grid: frames, height and width in tokens.
        window: the largest window, along the same axes; tokens merge only inside of one.
        cell: what has one receiver, along the same axes.
    """

    order: torch.Tensor
    places: torch.Tensor

    def __init__(self, grid: Box, window: Box, cell: Box) -> None:
        super().__init__()
        self.grid = grid
        order: list[int] = []
        groups: list[_Group] = []
        for spans in _windows_by_shape(grid, window):
            for corner in spans:
                joining, receivers = _sides(grid, corner, cell)
                order += joining + receivers
            groups.append(
                _Group(
                    num_windows=len(spans), num_joining=len(joining), num_receivers=len(receivers)
                )
            )
        self.groups = tuple(groups)
        places = torch.tensor(order)
        self.register_buffer("order", places, persistent=False)
        self.register_buffer("places", torch.argsort(places), persistent=False)

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(group.num_windows * group.size for group in self.groups)

    def num_kept(self, share: float) -> int:
        """K at `share`, which is rounded in every window and leaves all receivers."""
        return sum(group.num_windows * group.kept(share) for group in self.groups)

    def arrange(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[..., N, C]` from raster order to window order."""
        return tokens.index_select(-2, self.order)

    def rearrange(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[..., N, C]` from window order back to raster order."""
        return tokens.index_select(-2, self.places)

    def match(self, tokens: torch.Tensor, share: float, distance: Distance) -> WindowReduction:
        """Which of `tokens` `[R, N, C]`, in window order, join which receiver of their window."""
        sizes = [group.size for group in self.groups]
        parts = [
            _match(window, group, group.size - group.kept(share), distance)
            for group, window in zip(self.groups, self._cut(tokens, sizes), strict=True)
        ]
        return WindowReduction(windows=self, parts=tuple(parts))

    def _cut(self, tokens: torch.Tensor, sizes: list[int]) -> Iterator[torch.Tensor]:
        """`[R, *, C]` to `[R * windows, size, C]` for every group."""
        start = 0
        for group, size in zip(self.groups, sizes, strict=True):
            stop = start + group.num_windows * size
            yield tokens[:, start:stop].reshape(-1, size, tokens.shape[-1])
            start = stop


@dataclass(frozen=True, kw_only=True)
class WindowReduction:
    """A decided reduction from N to K tokens, one part for the windows of each shape."""

    windows: GridWindows
    parts: tuple[Reduction, ...]

    def apply(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[R, N, C]` in window order to averages `[R, K, C]` and their sizes `[R, K]`."""
        sizes = [group.size for group in self.windows.groups]
        reduced = [
            # Sizes are counted in float32: 16 bits hold only the first 256 or 2048 integers.
            part.apply(window, torch.ones_like(window[..., 0], dtype=torch.float32))
            for part, window in zip(self.parts, self.windows._cut(tokens, sizes), strict=True)
        ]
        rows = tokens.shape[0]
        values = torch.cat([part.reshape(rows, -1, tokens.shape[-1]) for part, _ in reduced], 1)
        return values, torch.cat([part.reshape(rows, -1) for _, part in reduced], 1)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[R, K, C]` back to `[R, N, C]` in window order; members get the value of the whole."""
        sizes = [part.kept.shape[1] for part in self.parts]
        restored = [
            part.restore(window).reshape(tokens.shape[0], -1, tokens.shape[-1])
            for part, window in zip(self.parts, self.windows._cut(tokens, sizes), strict=True)
        ]
        return torch.cat(restored, 1)


def _match(tokens: torch.Tensor, group: _Group, merges: int, distance: Distance) -> Reduction:
    """Inside of windows `[R * windows, size, C]` of one shape."""
    tokens = tokens.float()
    joining, receivers = tokens[:, : group.num_joining], tokens[:, group.num_joining :]
    if distance == "cosine":
        joining = functional.normalize(joining, dim=-1)
        receivers = functional.normalize(receivers, dim=-1)
        likeness = joining @ receivers.transpose(1, 2)
    else:
        # Minus the squared distance.
        squares = joining.square().sum(-1)[:, :, None] + receivers.square().sum(-1)[:, None]
        likeness = 2 * joining @ receivers.transpose(1, 2) - squares
    places = torch.arange(group.size, device=tokens.device).expand(tokens.shape[0], -1)
    return most_alike(
        likeness, places[:, : group.num_joining], places[:, group.num_joining :], merges
    )


# A stretch of an axis: where it starts and its length.
_Span = tuple[int, int]


def _spans(length: int, width: int) -> list[_Span]:
    """The fewest stretches of at most `width` that cover `length`, as equal as can be."""
    count = -(-length // width)
    ends = [length * (index + 1) // count for index in range(count)]
    return [(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _windows_by_shape(grid: Box, window: Box) -> list[list[tuple[_Span, ...]]]:
    """The windows, those of one shape together; each as its stretches along the axes."""
    groups: dict[tuple[int, ...], list[tuple[_Span, ...]]] = {}
    for spans in itertools.product(*map(_spans, grid, window)):
        groups.setdefault(tuple(length for _, length in spans), []).append(spans)
    return list(groups.values())


def _sides(grid: Box, window: tuple[_Span, ...], cell: Box) -> tuple[list[int], list[int]]:
    """Places in the raster of the tokens of a window that may join, and of its receivers."""
    middles = [
        {start + offset + (width - 1) // 2 for offset, width in _spans(length, edge)}
        for (start, length), edge in zip(window, cell, strict=True)
    ]
    joining: list[int] = []
    receivers: list[int] = []
    for place in itertools.product(*(range(start, start + length) for start, length in window)):
        receives = all(at in middle for at, middle in zip(place, middles, strict=True))
        frame, row, column = place
        side = receivers if receives else joining
        side.append((frame * grid[1] + row) * grid[2] + column)
    return joining, receivers
