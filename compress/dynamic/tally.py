"""What dynamic precision did: for every block and step the work that was done in how many bits.

Work is counted in multiplications of the linear layers: elements of the input times output
channels. What attention multiplies is not among it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vcompress.compress.cache.report import tenths

__all__ = ["BITS", "PrecisionReport", "Tally"]

# Of an input: four, eight, or as it is.
BITS = (4, 8, 16)

Work = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """Work since dynamic precision was applied.

    Attributes:
        blocks: full names, in order; rows of the array.
        work: of the layers that change, by block, step and bits of the input (see `BITS`),
            `[blocks, steps, 3]`.
        fixed: of all other linear layers, by bits.
        pinned: block calls with fine inputs since nothing was known of the step before, first
            steps not counted.
        block_calls: of all blocks.
        num_generations: that were started.
    """

    blocks: tuple[str, ...]
    work: Work
    fixed: tuple[int, int, int]
    pinned: int
    block_calls: int
    num_generations: int

    @property
    def share(self) -> float:
        """Of the work that changes, what ran with inputs of four bits."""
        return float(self.work[..., 0].sum() / max(1, self.work.sum()))

    @property
    def linear_share(self) -> float:
        """Of the work of all linear layers, what ran with inputs of four bits."""
        total = self.work.sum() + sum(self.fixed)
        return float((self.work[..., 0].sum() + self.fixed[0]) / max(1, total))

    @property
    def mean_bits(self) -> float:
        """Of the inputs of layers that change, weighted by work."""
        return float((self.work.sum((0, 1)) * BITS).sum() / max(1, self.work.sum()))

    def rate(self) -> NDArray[np.float64]:
        """The share in four bits `[blocks, steps]`; nan where nothing ran."""
        total = self.work.sum(-1)
        return np.where(total > 0, self.work[..., 0] / np.maximum(total, 1), np.nan)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a plan or a report file."""
        rate = [
            [None if value != value else round(float(value), 4) for value in row]
            for row in self.rate()
        ]
        return {
            "share": self.share, "linear_share": self.linear_share, "mean_bits": self.mean_bits,
            "pinned": self.pinned, "block_calls": self.block_calls,
            "num_generations": self.num_generations, "blocks": list(self.blocks), "rate": rate,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"{self.share:.1%} of the work that changes ran with inputs of four bits "
            f"({self.linear_share:.1%} of all linear layers), {self.mean_bits:.2f} bits on average",
            "one column a step; # more bits, . four bits, 1-9 tenths in four bits, blank never ran",
        ]
        width = max(map(len, self.blocks))
        four_bits, total = self.work[..., 0], self.work.sum(-1)
        lines += [
            f"{name:{width}} {''.join(map(tenths, part, whole))}"
            for name, part, whole in zip(self.blocks, four_bits, total, strict=True)
        ]
        return "\n".join(lines)


@dataclass
class Tally:
    """Counts while it runs. Keys of `work` are (block, step, bits)."""

    work: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    fixed: Counter[int] = field(default_factory=Counter)
    pinned: int = 0
    block_calls: int = 0
    num_generations: int = 0

    def report(self, blocks: tuple[str, ...]) -> PrecisionReport:
        """The counts as arrays."""
        num_steps = 1 + max((step for _, step, _ in self.work), default=-1)
        work = np.zeros((len(blocks), num_steps, len(BITS)), dtype=np.int64)
        for (block, step, bits), count in self.work.items():
            work[blocks.index(block), step, BITS.index(bits)] += count
        four, eight, whole = (self.fixed[bits] for bits in BITS)
        return PrecisionReport(
            blocks=blocks, work=work, fixed=(four, eight, whole), pinned=self.pinned,
            block_calls=self.block_calls, num_generations=self.num_generations,
        )  # fmt: skip
