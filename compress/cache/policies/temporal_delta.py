"""Temporal delta cache: each block is skipped while what it adds hardly changes.

Source: TDC and PDR of 6Bit-Diffusion (Su et al., 2026, arXiv:2603.18742), written from the
description of the rule. Delta_n = y_n - x_n of one block, for each block by itself.

    rate = |Delta_c - Delta_c'| / |Delta_c'| / (c - c'),   c' the computed step before c
    error = error + rate                                    (0 after a computed step)
    compute step n   if error > threshold, or reused in a row >= max_skips (2 in the paper),
                     or fewer than two steps were computed yet
    reuse            y_n = x_n + Delta_c

Keeping a delta that low precision has made noisy repeats its noise at every reuse. Purified delta
refresh has two rules against that, which belong to the precision of the layers: `Moment` (see
`cache.moment`) answers what they ask, "is a delta being written now" and "was the step before a
reuse".

What we changed: the change of Delta is taken per step between the computed ones, since a reused
step shows none of its own. All blocks' deltas together take as many tensors as there are blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Level, Policy, State, relative_l1

__all__ = ["TemporalDelta"]


@dataclass(frozen=True, kw_only=True)
class TemporalDelta(Policy):
    """See the module.

    Attributes:
        threshold: of the summed change.
    """

    level: ClassVar[Level] = "block"
    sums: ClassVar[Mapping[str, float]] = MappingProxyType({"error": 0.0})

    threshold: float

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `rate` and `count` of computed steps."""
        return {**super().start(value), "rate": torch.tensor(0.0), "count": torch.tensor(0)}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del value, step
        error = state["error"] + state["rate"]
        compute = (error > self.threshold) | (state["count"] < 2)
        return compute, {**state, "error": error, "change": state["rate"]}

    def computed(
        self, state: State, value: torch.Tensor | None, old: Sequence[State],
        kept: Sequence[State], step: torch.Tensor,
    ) -> State:  # fmt: skip
        """The rate is measured anew, from the second computed step on."""
        apart = state["skips"] + 1
        state = super().computed(state, value, old, kept, step)
        change = relative_l1(kept[0]["residual"], old[0]["residual"]).to(state["rate"])
        rate = torch.where(state["count"] >= 1, change / apart, torch.zeros_like(change))
        return {**state, "rate": rate, "count": state["count"] + 1}
