"""MagCache: the length of the residual follows a law that one calibration run finds.

Source: Ma et al., 2025, arXiv:2506.09045, written from the paper. g_n, the mean over tokens of
||r_n|| / ||r_(n-1)||, is nearly the same for every prompt, so a table of it tells without looking
how far a kept residual is off.

    ratio = ratio * g_n,   error = error + |1 - ratio|      (1 and 0 after a computed step)
    compute step n   if error > threshold or reused in a row >= max_skips
    reuse            y_n = x_n + r_c

What we changed: one table for both guidance branches, their mean; for another number of steps it is
read at the nearest relative place. Without a table g_n = 1 and the error stays 0, so it is a fixed
schedule of `max_skips` reuses; the report says so. The paper keeps the first 20 % of the steps,
here `protect_first`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Policy, State

__all__ = ["MagCache", "resampled"]


def resampled(table: tuple[float, ...], num_steps: int) -> tuple[float, ...]:
    """`table` for another number of steps: its entry at the nearest relative place."""
    if not table or num_steps == len(table):
        return table
    if num_steps == 1:
        return table[-1:]
    stride = (len(table) - 1) / (num_steps - 1)
    # Halves are rounded to the even entry.
    return tuple(table[round(step * stride)] for step in range(num_steps))


@dataclass(frozen=True, kw_only=True)
class MagCache(Policy):
    """See the module.

    Attributes:
        threshold: of the summed error; 0 computes all steps whose g_n is not 1.
        magnitudes: g_n for n in 0 .. N-1; none for 1 everywhere.
    """

    sums: ClassVar[Mapping[str, float]] = MappingProxyType({"ratio": 1.0, "error": 0.0})

    threshold: float
    magnitudes: tuple[float, ...] = ()

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del value
        growth = torch.ones_like(state["ratio"])
        if self.magnitudes:
            table = torch.tensor(self.magnitudes, dtype=torch.float32)
            growth = table[step.clamp(max=len(self.magnitudes) - 1)]
        ratio = state["ratio"] * growth
        change = (1 - ratio).abs()
        error = state["error"] + change
        return error > self.threshold, {**state, "ratio": ratio, "error": error, "change": change}
