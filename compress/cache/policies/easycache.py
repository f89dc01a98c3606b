"""EasyCache: while the model answers a change of its input at a steady rate, skip it whole.

Source: Zhou et al., 2025, arXiv:2507.02860, written from the paper. x_n is the latent, y_n the
output of the whole transformer, c and c' the last two computed steps.

    k = |y_c - y_c'| / |x_c - x_c'|
    error = error + k |x_n - x_(n-1)| / |y_(n-1)|       (0 after a computed step)
    compute step n   if error >= threshold, or fewer than two steps were computed yet
    reuse            y_n = x_n + (y_c - x_c)

Nothing is calibrated. A reused step does not even embed its input.
What we changed: where input and output have different numbers of channels (a conditioning image in
the input, a variance in the output) the difference of the latents is cut or filled with zeros:
y_n = y_c + fit(x_n - x_c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Level, Policy, Signal, State

__all__ = ["EasyCache"]

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class EasyCache(Policy):
    """See the module.

    Attributes:
        threshold: of the summed change.
    """

    level: ClassVar[Level] = "model"
    signal: ClassVar[Signal] = "input"
    sums: ClassVar[Mapping[str, float]] = MappingProxyType({"error": 0.0})

    threshold: float

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `rate` k, `count` of computed steps, `size` |y_(n-1)|, `last` x_(n-1)."""
        assert value is not None
        scalars = {name: torch.tensor(0.0) for name in ("rate", "size")}
        last = torch.zeros_like(value)
        return {**super().start(value), **scalars, "count": torch.tensor(0), "last": last}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del step
        assert value is not None
        moved = _mean(value - state["last"]).to(state["error"])
        change = state["rate"] * moved / state["size"].clamp_min(_TINY)
        error = state["error"] + change
        state = {**state, "error": error, "change": change, "last": value}
        return (error >= self.threshold) | (state["count"] < 2), state

    def computed(
        self, state: State, value: torch.Tensor | None, old: Sequence[State],
        kept: Sequence[State], step: torch.Tensor,
    ) -> State:  # fmt: skip
        """Measure k anew, from the second computed step on."""
        state = super().computed(state, value, old, kept, step)
        before, now = old[0], kept[0]
        moved = _mean(now["input"] - before["input"]).clamp_min(_TINY)
        rate = _mean(now["output"] - before["output"]) / moved
        return {
            **state, "count": state["count"] + 1,
            "rate": rate.to(state["rate"]), "size": _mean(now["output"]).to(state["size"]),
        }  # fmt: skip

    def reused(self, state: State, after: torch.Tensor) -> State:
        """|y_(n-1)| is that of what was returned."""
        return {**super().reused(state, after), "size": _mean(after).to(state["size"])}

    def blank(self, before: torch.Tensor, after: torch.Tensor) -> State:
        """Input and output of no step yet."""
        return {"input": torch.zeros_like(before), "output": torch.zeros_like(after)}

    def keep(
        self, old: State, before: torch.Tensor, after: torch.Tensor, step: torch.Tensor
    ) -> State:
        """Input and output."""
        del old, step
        return {"input": before, "output": after}

    def reuse(self, kept: State, before: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The kept output, moved by as much as the input has moved."""
        del step
        return kept["output"] + _fitted(before - kept["input"], kept["output"])


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().mean(dtype=torch.float32)


def _fitted(moved: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`moved` with the shape of `like`, from which it differs in the number of channels at most."""
    for axis, (have, want) in enumerate(zip(moved.shape, like.shape, strict=True)):
        if have > want:
            moved = moved.narrow(axis, 0, want)
        elif have < want:
            shape = list(moved.shape)
            shape[axis] = want - have
            moved = torch.cat([moved, moved.new_zeros(shape)], dim=axis)
    return moved.to(like.dtype)
