"""Not a policy: it computes everything and measures what the others' laws are fitted to.

    change    d_n = |F_n - F_(n-1)| / |F_(n-1)|             what TeaCache looks at
    residual  |r_n - r_(n-1)| / |r_(n-1)|                   what it foretells
    growth    mean over tokens of ||r_n|| / ||r_(n-1)||     what MagCache knows by heart

Where the stack falls into segments, the last two are means over these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Policy, Signal, State, relative_l1

__all__ = ["Observer"]

_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Observer(Policy):
    """See the module."""

    signal: ClassVar[Signal] = "modulated"

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `reference`, which is F_(n-1), and what is measured."""
        assert value is not None
        measured = {name: torch.tensor(0.0) for name in ("residual", "growth")}
        return {**super().start(value), **measured, "reference": torch.zeros_like(value)}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del step
        assert value is not None
        change = relative_l1(value, state["reference"]).to(state["change"])
        return torch.tensor(True), {**state, "change": change, "reference": value}

    def computed(
        self, state: State, value: torch.Tensor | None, old: Sequence[State],
        kept: Sequence[State], step: torch.Tensor,
    ) -> State:  # fmt: skip
        """Compare the residuals with those of the step before."""
        pairs = [(now["residual"], then["residual"]) for now, then in zip(kept, old, strict=True)]
        residual = torch.stack([relative_l1(now, then) for now, then in pairs]).mean()
        growth = torch.stack([_growth(now, then) for now, then in pairs]).mean()
        measured = {"residual": residual.cpu(), "growth": growth.cpu()}
        return {**super().computed(state, value, old, kept, step), **measured}


def _growth(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(now.float(), dim=-1)
    before: torch.Tensor = torch.linalg.vector_norm(then.float(), dim=-1)
    return (lengths / (before + _TINY)).mean()
