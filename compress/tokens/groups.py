"""Sums of rows by the group that each belongs to, without a scatter and for groups of any size.

What: rows are sorted by group and cut into blocks of about their square root; inside each block a
small one-hot product adds up those of one group. A group that begins in an earlier block has its
part there in that block's last row, so one more small product, over blocks, completes it. A one-hot
product over all rows costs r^2 C; this costs 2 r^1.5 C.
Source: ours; block sums with carries between blocks are how prefix sums are computed in parallel
(Blelloch, 1990). Nothing is subtracted, so nothing cancels.

Shapes: B sequences, r rows, C width, G groups, n blocks of b rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vcompress.compress.tokens.ranking import ascending_order

__all__ = ["Groups", "take"]


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `[B, K, C]` of `x` `[B, N, C]` at `index` `[B, K]`.

    One gather over all rows: an index for every element, as `torch.gather` wants it, costs more
    than the rows.
    """
    num_sequences, num_tokens, width = x.shape
    first = torch.arange(num_sequences, device=x.device)[:, None] * num_tokens
    rows = x.reshape(-1, width).index_select(0, (index + first).reshape(-1))
    return rows.view(num_sequences, index.shape[1], width)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which rows belong together, decided once for any number of sums.

    Attributes:
        order: `[B, n b]`, rows by group; what is over repeats the first row and counts for nothing.
        counts: `[B, n b]`, 1, or 0 for what is over.
        same: `[B, n, b, b]`, 1 where two rows of a block are of one group.
        last: `[B, G]`, where in `order` each group ends; of an empty group a row that is over.
        carries: `[B, G, n]`, from which blocks before the one where it ends each group has a part.
    """

    order: torch.Tensor
    counts: torch.Tensor
    same: torch.Tensor
    last: torch.Tensor
    carries: torch.Tensor

    @staticmethod
    def of(group: torch.Tensor, num_groups: int) -> Groups:
        """Groups 0..G-1 of rows, int64 `[B, r]`, r at least 1."""
        num_rows = group.shape[1]
        num_blocks = math.isqrt(num_rows)
        # At least one row is over, for the empty groups to end at.
        block_rows = num_rows // num_blocks + 1
        over = num_blocks * block_rows - num_rows
        order = ascending_order(group)
        ordered = torch.nn.functional.pad(group.gather(1, order), (0, over), value=num_groups)
        blocks = torch.unflatten(ordered, 1, (num_blocks, block_rows))
        number = torch.arange(num_groups, device=group.device)
        upto = (group[:, None, :] <= number[:, None]).float().sum(-1).to(group.dtype)
        before = torch.nn.functional.pad(upto[:, :-1], (1, 0))
        last = torch.where(upto > before, upto - 1, num_rows)
        # Blocks are sorted, so a part in an earlier block is at the end of that block.
        is_earlier = (
            torch.arange(1, num_blocks + 1, device=group.device) * block_rows <= last[..., None]
        )
        carries = is_earlier & (blocks[:, None, :, -1] == number[:, None])
        return Groups(
            order=torch.nn.functional.pad(order, (0, over)),
            counts=(ordered < num_groups).float(),
            same=(blocks[..., :, None] == blocks[..., None, :]).float(),
            last=last,
            carries=carries.float(),
        )

    def sums(
        self, rows: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weighted sums of each group.

        Args:
            rows: `[B, r, C]`; with `places`, `[B, N, C]`.
            weights: `[B, r]`.
            places: which of `rows` are the r of the groups, `[B, r]`; None for all.

        Returns:
            `[B, G, C]`; 0 for empty groups.
        """
        of_block = self.same.shape[1:3]
        weighing = torch.unflatten(weights.gather(1, self.order) * self.counts, 1, of_block)
        order = self.order if places is None else places.gather(1, self.order)
        mixing = (self.same * weighing[:, :, None, :]).to(rows.dtype)
        parts = mixing @ torch.unflatten(take(rows, order), 1, of_block)
        carried = self.carries.to(rows.dtype) @ parts[:, :, -1]
        return take(parts.flatten(1, 2), self.last) + carried
