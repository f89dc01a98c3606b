"""TeaCache: the input of the first block, modulated by the timestep, foretells the output.

Source: Liu et al., 2024, arXiv:2411.19108, written from the paper. F_n is what the first layer of
the first block is given, after norm, scale and shift.

    d_n = |F_n - F_(n-1)| / |F_(n-1)|,   error = error + p(d_n)      (0 after a computed step)
    compute step n   if error >= threshold
    reuse            y_n = x_n + r_c

p is a polynomial of degree 4 at most that maps the change of F to the change of the output.
What we changed: p is fitted by our own calibration, and to the change of the residual, which is
what a reuse gets wrong; until then it is the identity. Outside of the range that it was fitted to
it keeps the value at the end, and it never falls below 0, since a polynomial of degree 4 does
anything there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Policy, Signal, State, relative_l1

__all__ = ["TeaCache", "polynomial"]


def polynomial(coefficients: tuple[float, ...], at: torch.Tensor) -> torch.Tensor:
    """The polynomial with these coefficients, highest power first."""
    value = torch.zeros_like(at)
    for coefficient in coefficients:
        value = value * at + coefficient
    return value


@dataclass(frozen=True, kw_only=True)
class TeaCache(Policy):
    """See the module.

    Attributes:
        threshold: of the summed change.
        coefficients: of p.
        signal_range: smallest and largest d_n that p was fitted to.
    """

    signal: ClassVar[Signal] = "modulated"
    sums: ClassVar[Mapping[str, float]] = MappingProxyType({"error": 0.0})

    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    signal_range: tuple[float, float] | None = None

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `reference`, which is F_(n-1)."""
        assert value is not None
        return {**super().start(value), "reference": torch.zeros_like(value)}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del step
        assert value is not None
        change = relative_l1(value, state["reference"]).to(state["change"])
        at = change if self.signal_range is None else change.clamp(*self.signal_range)
        error = state["error"] + polynomial(self.coefficients, at).clamp_min(0)
        state = {**state, "error": error, "change": change, "reference": value}
        return error >= self.threshold, state
