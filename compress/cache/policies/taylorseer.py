"""TaylorSeer: what the blocks add is continued as a Taylor expansion over the steps.

Source: Liu et al., 2025, arXiv:2503.06923, written from the paper.

    D_0 = r_c,   D_i = (D_(i-1) at c - D_(i-1) at c') / (c - c'),   c' the computed step before c
    compute step n   if reused in a row >= interval - 1   (or: if n is on the list)
    reuse            y_n = x_n + sum over i <= order of D_i (n - c)^i / i!

What we changed: the paper expands the output of every attention and every feed-forward layer, which
takes as many tensors as there are layers; here the residual of the whole stack is expanded, which
takes order + 1. Orders that too few steps were computed for are left out. A list of steps, which
`schedule` finds, can take the place of the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vcompress.compress.cache.policies.base import State
from vcompress.compress.cache.policies.fixed import Fixed

__all__ = ["TaylorSeer"]


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Fixed):
    """See the module; which steps are computed is a fixed schedule.

    Attributes:
        order: highest power; 0 keeps the residual as it is.
    """

    order: int

    def blank(self, before: torch.Tensor, after: torch.Tensor) -> State:
        """Differences of no order; `count` of computed steps and `at`, the last of them."""
        del before
        differences = {f"d{order}": torch.zeros_like(after) for order in range(self.order + 1)}
        return {**differences, "count": torch.tensor(0), "at": torch.tensor(0)}

    def keep(
        self, old: State, before: torch.Tensor, after: torch.Tensor, step: torch.Tensor
    ) -> State:
        """Divided differences up to the order that the computed steps allow."""
        apart = (step - old["at"]).clamp(min=1)
        kept = {"d0": after - before, "count": old["count"] + 1, "at": step}
        for order in range(1, self.order + 1):
            below = f"d{order - 1}"
            weight = (old["count"] >= order) / apart
            kept[f"d{order}"] = (kept[below] - old[below]) * weight
        return kept

    def reuse(self, kept: State, before: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The expansion at `step`."""
        ahead = (step - kept["at"]).to(torch.float32)
        after = before + kept["d0"]
        for order in range(1, self.order + 1):
            after = after + kept[f"d{order}"] * (ahead**order / math.factorial(order))
        return after
