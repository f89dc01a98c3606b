"""Floating-point operations of a token schedule, block by block.

Counted: the linears of a block (2 operations a weight and token) and its attention (query . key
and attention . value, 4 operations a pair of tokens and channel). Norms, biases and matching are
not; `benchmarks/tokens.py` counts what really ran.

Shapes: T frames, L places, S special tokens, C channels of the attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vcompress.models.video import TokenGrid, VideoModel
from vcompress.spec.token_section import TokenSection

__all__ = ["ScheduleCost", "counts_of"]


@dataclass(frozen=True)
class _BlockCost:
    weights: int
    width: int


@dataclass(frozen=True)
class ScheduleCost:
    """Prices schedules of one model; a schedule is the number of patches that each block sees.

    Attributes:
        grid: of the model.
        blocks: what each of the model's token blocks holds, in order.
        after: the same of the blocks behind them, which see the tokens that are left; and whether
            they attend to all of them, or over the frames at each place.
        rest: operations outside of these blocks, which no schedule changes, for one clip.
    """

    grid: TokenGrid
    blocks: tuple[_BlockCost, ...]
    after: tuple[tuple[_BlockCost, bool], ...]
    rest: int

    @classmethod
    def of(cls, model: VideoModel) -> ScheduleCost:
        """Read the weights of `model`."""
        grid, names = model.token_grid, model.token_blocks
        assert grid is not None
        behind = model.blocks[model.blocks.index(names[-1]) + 1 :] if names else ()
        after = tuple(
            (
                _block_cost(model, name),
                any(name.startswith(f"{reader}.") for reader in grid.readers),
            )
            for name in behind
        )
        # Of the rest, only the embedding of patches is worth counting: it sees every patch.
        rest = sum(
            2 * grid.num_patches * math.prod(facts.weight_shape)
            for facts in model.layers.values()
            if facts.kind.startswith("conv")
        )
        blocks = tuple(_block_cost(model, name) for name in names)
        return cls(grid=grid, blocks=blocks, after=after, rest=rest)

    def block(self, index: int, patches: int) -> int:
        """Operations of one block on a clip of which it sees `patches` patch tokens."""
        cost, grid = self.blocks[index], self.grid
        if grid.arrangement == "joint":
            tokens = patches + grid.special
            return 2 * cost.weights * tokens + 4 * cost.width * tokens**2
        places = patches // grid.frames + grid.special
        space = grid.frames * 4 * cost.width * places**2
        linear = 2 * cost.weights * places * grid.frames
        if grid.arrangement == "divided":
            space += 4 * cost.width * (patches // grid.frames) * grid.frames**2
        return linear + space

    def total(self, counts: Sequence[int]) -> int:
        """Operations of a schedule, for one clip."""
        blocks = sum(self.block(index, patches) for index, patches in enumerate(counts))
        left = counts[-1]
        for cost, attends_to_all in self.after:
            seen = left if attends_to_all else self.grid.frames
            blocks += 2 * cost.weights * left + 4 * cost.width * left * seen
        return self.rest + blocks

    def share(self, counts: Sequence[int]) -> float:
        """Operations as a share of those without reduction."""
        return self.total(counts) / self.total([self.grid.num_patches] * len(self.blocks))


def _block_cost(model: VideoModel, block: str) -> _BlockCost:
    shapes = [
        facts.weight_shape
        for layer, facts in model.layers.items()
        if layer.startswith(f"{block}.") and facts.kind == "linear"
    ]
    weights = sum(rows * columns for rows, columns in shapes)
    return _BlockCost(weights, min((columns for _, columns in shapes), default=0))


def counts_of(section: TokenSection, blocks: Sequence[str]) -> list[int]:
    """Patch tokens that each of `blocks` sees."""
    left, counts = section.num_patches, list[int]()
    for block in blocks:
        if block in section.sites:
            left = section.sites[block].keep
        counts.append(left)
    return counts
