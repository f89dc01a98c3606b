"""What a technique decides, and what it does to tokens: static shapes, no scatter.

A token stands for one or several patches; how many is its size. A reduction from N tokens to K is
one of two kinds. `Reduction` keeps some tokens and lets others join them or leave: one gather and
one product with a one-hot matrix, or `groups` for many, since `scatter_reduce(reduce="mean")`
exports to ONNX as another operation without a word. `Mixing` builds each new token out of all (see
`techniques.centroids`).

Both average by size, know where each token went, and can put the result back on all N places.

Shapes: B sequences, N tokens, K tokens that are kept, r tokens that leave, C width, P new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vcompress.compress.tokens.groups import Groups, take

__all__ = ["MANY_SOURCES", "Chain", "Mixing", "Reducer", "Reduction", "take"]

# From so many sources on, one product over all of them costs more than sorting them.
MANY_SOURCES = 256


class Reducer(Protocol):
    """A decided reduction of `[B, N, C]`."""

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, N, C]` and sizes `[B, N]` to those that are left."""
        ...

    def destination(self) -> torch.Tensor:
        """Where each token went, int64 `[B, N]`: a place in the result, or -1."""
        ...

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse for dense outputs: `[B, K, C]` back to `[B, N, C]`, members get the whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Some tokens stay; the others join one of them, or are dropped.

    Attributes:
        kept: `[B, K]` int64, in the order of the result.
        source: `[B, r]` int64, the tokens that leave; N = K + r.
        target: `[B, r]` int64, which of the last `num_receivers` kept tokens they belong to.
        num_receivers: how many of `kept`, counted from its end, can receive.
        value_share: what part of the source counts in the average of the target: a number, or
            `[B, r]`. 0 keeps the target as it is.
        size_share: what part of the source's size the target takes over: a number, or `[B, r]`.
            1 conserves the total.
    """

    kept: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    num_receivers: int
    value_share: float | torch.Tensor = 1.0
    size_share: float | torch.Tensor = 1.0

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reducer`. A kept token that nothing joins does not change by a bit."""
        column = sizes[..., None]
        if self.source.shape[1] == 0:
            return take(tokens, self.kept), take(column, self.kept)[..., 0]
        alone = self.kept.shape[1] - self.num_receivers
        receivers = self.kept[:, alone:]
        if not _is(self.value_share, 0.0):
            if self.source.shape[1] >= MANY_SOURCES:
                return self._apply_many(tokens, column, receivers)
            if 2 * self.source.shape[1] <= self.num_receivers:
                return self._apply_few(tokens, column, receivers)
        own, moving = take(column, receivers), take(column, self.source)
        joins = self._joins(sizes.dtype)
        merged, grown = take(tokens, receivers), own
        if not _is(self.value_share, 0.0):
            counted = joins * (moving * _column(self.value_share)).transpose(1, 2)
            total = own + counted.sum(-1, keepdim=True)
            # Everything is divided in the small matrices: wide arrays are passed over least. Where
            # nothing joins, this multiplies by exactly 1 and adds 0.
            joined = (counted / total).to(tokens.dtype) @ take(tokens, self.source)
            merged = merged * (own / total).to(tokens.dtype) + joined
        if not _is(self.size_share, 0.0):
            grown = own + joins @ (moving * _column(self.size_share))
        new_tokens = torch.cat([take(tokens, self.kept[:, :alone]), merged], dim=1)
        new_sizes = torch.cat([take(column, self.kept[:, :alone]), grown], dim=1)
        return new_tokens, new_sizes[..., 0]

    def _apply_few(
        self, tokens: torch.Tensor, column: torch.Tensor, receivers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `apply`, where most receivers do not change: only those that do are computed.

        Sources with one target each compute its new row; one gather then takes a row for every
        token that stays, the old one or the new one.
        """
        source, target = self.source, self.target
        place = receivers.gather(1, target)
        same = (target[:, :, None] == target[:, None, :]).to(column.dtype)
        own, moving = take(column, place), take(column, source)
        counted = same * (moving * _column(self.value_share)).transpose(1, 2)
        total = own + counted.sum(-1, keepdim=True)
        joined = (counted / total).to(tokens.dtype) @ take(tokens, source)
        changed = take(tokens, place) * (own / total).to(tokens.dtype) + joined
        grown = own + same @ (moving * _column(self.size_share))
        # Counted from 1, so that 0 is a receiver that nothing joins.
        numbers = torch.arange(1, source.shape[1] + 1, device=target.device, dtype=torch.float32)
        last = (self._joins(torch.float32) * numbers).amax(-1).to(target.dtype)
        rows = torch.where(last > 0, last + (tokens.shape[1] - 1), receivers)
        rows = torch.cat([self.kept[:, : self.kept.shape[1] - self.num_receivers], rows], dim=1)
        return (
            take(torch.cat([tokens, changed], dim=1), rows),
            take(torch.cat([column, grown], dim=1), rows)[..., 0],
        )

    def _apply_many(
        self, tokens: torch.Tensor, column: torch.Tensor, receivers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `apply`, where a one-hot product over all sources would be most of the work."""
        groups = Groups.of(self.target, self.num_receivers)
        own, moving = take(column, receivers), take(column, self.source)
        ones = torch.ones_like(moving[..., 0])
        both = [moving * _column(self.value_share), moving * _column(self.size_share)]
        added = groups.sums(torch.cat(both, dim=-1), ones)
        total = own + added[..., :1]
        # Divided in front of the product, as everywhere: sums of half precision stay in range.
        shares = both[0] / take(total, self.target)
        joined = groups.sums(tokens, shares[..., 0], self.source)
        merged = take(tokens, receivers) * (own / total).to(tokens.dtype) + joined
        grown = own + added[..., 1:]
        alone = self.kept[:, : self.kept.shape[1] - self.num_receivers]
        if alone.shape[1] > 0:
            merged = torch.cat([take(tokens, alone), merged], dim=1)
            grown = torch.cat([take(column, alone), grown], dim=1)
        return merged, grown[..., 0]

    def destination(self) -> torch.Tensor:
        """See `Reducer`; -1 for a source that neither counts nor hands over its size."""
        alone = self.kept.shape[1] - self.num_receivers
        joined = self.target + alone
        if _is(self.value_share, 0.0) and _is(self.size_share, 0.0):
            joined = torch.full_like(joined, -1)
        return self._placed(joined)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reducer`; a dropped token gets the value of its target."""
        alone = self.kept.shape[1] - self.num_receivers
        return take(tokens, self._placed(self.target + alone))

    def _joins(self, dtype: torch.dtype) -> torch.Tensor:
        """One-hot `[B, num_receivers, r]`: which receiver each source joins."""
        receivers = torch.arange(self.num_receivers, device=self.target.device)
        return (receivers[None, :, None] == self.target[:, None, :]).to(dtype)

    def _placed(self, joined: torch.Tensor) -> torch.Tensor:
        """`[B, N]`: kept tokens at their place in the result, sources at `joined`."""
        order = torch.cat([self.kept, self.source], dim=1)
        places = torch.arange(self.kept.shape[1], device=order.device).expand_as(self.kept)
        # The inverse of a permutation; every place is written once.
        return torch.zeros_like(order).scatter(1, order, torch.cat([places, joined], dim=1))


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Every new token is an average of all.

    Attributes:
        shares: `[B, N, P]`, how each token is divided among the new ones; rows sum to 1.
    """

    shares: torch.Tensor

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reducer`."""
        weights = (self.shares * sizes[..., None]).transpose(1, 2)
        new_sizes = weights.sum(-1)
        # A new token that nobody gives to is empty; it must not become NaN.
        averages = weights / new_sizes.clamp(min=1e-30)[..., None]
        return averages.to(tokens.dtype) @ tokens, new_sizes

    def destination(self) -> torch.Tensor:
        """See `Reducer`: where the largest share went."""
        return self.shares.argmax(-1)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reducer`: each token is mixed back from the new ones."""
        return self.shares.to(tokens.dtype) @ tokens


@dataclass(frozen=True)
class Chain:
    """Several reductions in a row, the first one first; at least one."""

    parts: tuple[Reducer, ...]

    def apply(self, tokens: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reducer`."""
        for part in self.parts:
            tokens, sizes = part.apply(tokens, sizes)
        return tokens, sizes

    def destination(self) -> torch.Tensor:
        """See `Reducer`."""
        places = self.parts[0].destination()
        for part in self.parts[1:]:
            then = part.destination().gather(1, places.clamp(min=0))
            places = torch.where(places >= 0, then, places)
        return places

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reducer`."""
        for part in reversed(self.parts):
            tokens = part.restore(tokens)
        return tokens


def _is(share: float | torch.Tensor, value: float) -> bool:
    return isinstance(share, float) and share == value


def _column(share: float | torch.Tensor) -> float | torch.Tensor:
    return share if isinstance(share, float) else share[..., None]
