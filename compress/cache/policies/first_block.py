"""First-block cache: what the first block adds foretells what the others will add.

Source: First Block Cache of ParaAttention (github.com/chengzeyi/ParaAttention) and its
generalisation DBCache of cache-dit (github.com/vipshop/cache-dit), written from the description of
their rule; no code was taken. h_n is what the first F blocks add to the main stream.

    d_n = |h_n - h_c| / |h_c|,   c the last computed step
    compute step n   if d_n > threshold
    reuse            what the blocks between the first F and the last B added at c

The first F and the last B blocks always run: F = 1 and B = 0 is First Block Cache, F = 8 what
DBCache takes.
What we changed: where the model works on tokens between two blocks in a way that changes their
shape, h_n is what the last of the F blocks adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Policy, Signal, State, relative_l1

__all__ = ["FirstBlock"]


@dataclass(frozen=True, kw_only=True)
class FirstBlock(Policy):
    """See the module.

    Attributes:
        threshold: of d_n.
    """

    signal: ClassVar[Signal] = "front"

    threshold: float

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `reference`, which is h_c."""
        assert value is not None
        return {**super().start(value), "reference": torch.zeros_like(value)}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del step
        assert value is not None
        change = relative_l1(value, state["reference"]).to(state["change"])
        return change > self.threshold, {**state, "change": change}

    def computed(
        self, state: State, value: torch.Tensor | None, old: Sequence[State],
        kept: Sequence[State], step: torch.Tensor,
    ) -> State:  # fmt: skip
        """h_c becomes h_n."""
        assert value is not None
        return {**super().computed(state, value, old, kept, step), "reference": value}
