"""Patches painted by the token that they became.

A group of merged patches is painted with its mean colour and outlined. A group has one colour of
outline in all frames; groups that touch, in a frame or from one frame to the next, differ. Patches
that stand for themselves are left as they are, dropped ones are darkened and hatched.

Shapes: T frames, H W rows and columns of pixels, C channels, h w rows and columns of patches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Frames", "Paint", "Places", "colour_groups", "outline"]

Frames = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]
_T = TypeVar("_T", bound=np.generic)

# Outlines: bright and far from each other, also on gray.
_PALETTE = np.array(
    [
        (255, 225, 25), (60, 200, 255), (245, 60, 60), (90, 230, 80), (255, 120, 220),
        (255, 145, 20), (90, 110, 255), (20, 215, 175), (200, 90, 255), (190, 255, 110),
        (255, 175, 165), (20, 150, 90), (190, 30, 110), (150, 215, 255), (170, 120, 40),
    ],
    np.uint8,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Paint:
    """What every patch is painted with.

    Attributes:
        origin: `[T, h, w]`.
        merged: `[T, h, w]`, whether the patch belongs to a group of two or more.
        mean: `[T, h, w, 3]`, the mean colour of its group over all frames.
        edge: `[T, h, w, 3]`, the colour of its group's outline.
    """

    origin: Places
    merged: npt.NDArray[np.bool_]
    mean: Frames
    edge: Frames

    @classmethod
    def of(cls, frames: Frames, origin: Places) -> Paint:
        """From all frames `[T, H, W, C]`, also those that are not shown."""
        num_frames, rows, columns = origin.shape
        height, width = frames.shape[1] // rows, frames.shape[2] // columns
        fitting = frames[:, : rows * height, : columns * width]
        patches = fitting.reshape(num_frames, rows, height, columns, width, -1).mean((2, 4))
        patches = np.broadcast_to(patches, (*origin.shape, 3)).reshape(-1, 3)
        groups, index, counts = np.unique(origin, return_inverse=True, return_counts=True)
        index = index.reshape(-1)
        sums = np.zeros((len(groups), 3))
        np.add.at(sums, index, patches)
        colours = colour_groups(origin)
        edges = _PALETTE[[colours.get(group, 0) for group in groups.tolist()]]
        means = np.rint(sums / counts[:, None]).astype(np.uint8)
        return cls(
            origin=origin,
            merged=((counts > 1) & (groups >= 0))[index].reshape(origin.shape),
            mean=means[index].reshape(*origin.shape, 3),
            edge=edges[index].reshape(*origin.shape, 3),
        )

    def on(self, picture: Frames, frame: int) -> Frames:
        """`picture` of `frame`, painted."""
        groups = self.origin[frame]
        cell = picture.shape[0] // groups.shape[0], picture.shape[1] // groups.shape[1]
        border = outline(groups, cell, width=min(3, 1 + min(cell) // 24))
        merged = _enlarged(self.merged[frame], cell)
        result = picture.copy()
        for where, colours in (
            (_enlarged(groups < 0, cell), _darkened(picture)),
            (merged, _enlarged(self.mean[frame], cell)),
            (merged & border, _enlarged(self.edge[frame], cell)),
        ):
            result[where] = colours[where]
        return result


def outline(groups: Places, cell: tuple[int, int], width: int) -> npt.NDArray[np.bool_]:
    """Pixels of `groups` `[h, w]` within `width` of another group or of the edge of the frame.

    Args:
        groups: patches with the same number belong together.
        cell: pixels of a patch, height and width.
        width: in pixels, at most half a cell.
    """
    rows, columns = groups.shape[0] * cell[0], groups.shape[1] * cell[1]
    pixels = _enlarged(groups, cell)
    # No group has this number, so the frame's edge is a border too.
    around = np.pad(pixels, width, constant_values=np.iinfo(np.int64).min)
    result = np.zeros((rows, columns), bool)
    for y in range(2 * width + 1):
        for x in range(2 * width + 1):
            result |= around[y : y + rows, x : x + columns] != pixels
    return result


def colour_groups(origin: Places) -> dict[int, int]:
    """A number of a colour for every group of two or more patches of `origin` `[T, h, w]`.

    Large groups choose first: among the colours that no neighbour has, the one used least.
    """
    counts = Counter(origin[origin >= 0].tolist())
    neighbours: dict[int, set[int]] = {group: set() for group in counts}
    for a, b in _touching(origin):
        neighbours[a].add(b)
        neighbours[b].add(a)
    chosen: dict[int, int] = {}
    usage = [0] * len(_PALETTE)
    for group, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < 2:
            continue
        near = Counter(chosen[other] for other in neighbours[group] if other in chosen)
        colour = min(range(len(usage)), key=lambda index: (near[index], usage[index], index))
        chosen[group] = colour
        usage[colour] += 1
    return chosen


def _touching(origin: Places) -> set[tuple[int, int]]:
    """Pairs of different groups side by side, corner to corner, or behind each other in time."""
    after, before = slice(1, None), slice(None, -1)
    every = slice(None)
    pairs = (
        ((every, every, before), (every, every, after)),
        ((every, before, every), (every, after, every)),
        ((every, before, before), (every, after, after)),
        ((every, before, after), (every, after, before)),
        ((before, every, every), (after, every, every)),
    )
    found: set[tuple[int, int]] = set()
    for first, second in pairs:
        both = np.stack([origin[first].ravel(), origin[second].ravel()], 1)
        different = both[(both[:, 0] != both[:, 1]) & (both >= 0).all(1)]
        found |= {(int(a), int(b)) for a, b in np.unique(different, axis=0)}
    return found


def _enlarged(values: npt.NDArray[_T], cell: tuple[int, int]) -> npt.NDArray[_T]:
    """One value a patch, `[h, w, ...]`, to one a pixel."""
    return values.repeat(cell[0], 0).repeat(cell[1], 1)


def _darkened(picture: Frames) -> Frames:
    """`picture`, dark, with diagonal lines."""
    dark = (picture * 0.25 + 12).astype(np.uint8)
    y, x = np.indices(picture.shape[:2])
    dark[(x + y) % 8 < 2] = 112
    return dark
