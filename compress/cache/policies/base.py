"""What all cache policies have in common: state as tensors, rules as pure functions of it.

A policy holds numbers only. What changes from step to step is handed in and handed back, as a flat
dict of tensors whose names and shapes stay the same over a run: so the very same functions work on
a live model and in a graph that has the state as inputs and outputs.

    compute, state = policy.decide(state, value, step)      # is step n computed?
    if compute:
        after = blocks(before)
        kept = policy.keep(old, before, after, step)        # once for every stream and segment
        state = policy.computed(state, value, [old], [kept], step)
    else:
        after = policy.reuse(old, before, step)
        state = policy.reused(state, after)

`state` has scalars (on the CPU, so that one transfer a decision is enough) and whatever the rule
compares with; `old` and `kept` have what is used again. Decisions are made for the whole batch: the
means of the formulas run over all clips in it.

Notation of the formulas: step n, x_n what enters the blocks, y_n what leaves them, r_n = y_n - x_n;
|a| is the mean of the absolute values of a; c is the last computed step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

__all__ = ["Level", "Policy", "Signal", "State", "is_listed", "relative_l1"]

State = dict[str, torch.Tensor]

# What one decision is for, and what is kept: the whole model, its stack of blocks, each block.
Level = Literal["model", "stack", "block"]
# What a decision looks at: nothing; the model's input; the input of the first block's first layer;
# what the first blocks add.
Signal = Literal["none", "input", "modulated", "front"]

_TINY = 1e-12


def is_listed(steps: Sequence[int], step: torch.Tensor) -> torch.Tensor:
    """Whether `step`, an integer scalar, is one of `steps`."""
    return (torch.tensor(tuple(steps), dtype=torch.int64) == step).any()


def relative_l1(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|tensor - reference| / |reference|, a float32 scalar."""
    change = (tensor - reference).abs().mean(dtype=torch.float32)
    return change / reference.abs().mean(dtype=torch.float32).clamp_min(_TINY)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of the policies: the residual is kept and added, protected steps are computed.

    Attributes:
        sums: scalars of the state that begin again at these values after a computed step.
        num_steps: N of the run.
        protect_first, protect_last: steps that are always computed.
        max_skips: steps in a row that may be reused.
        front_blocks, back_blocks: blocks at either end that always run.
    """

    level: ClassVar[Level] = "stack"
    signal: ClassVar[Signal] = "none"
    sums: ClassVar[Mapping[str, float]] = MappingProxyType({})

    num_steps: int
    protect_first: int
    protect_last: int
    max_skips: int | None = None
    front_blocks: int = 0
    back_blocks: int = 0

    def start(self, value: torch.Tensor | None) -> State:
        """The state in front of step 0; `value` only says what shape the signal has.

        `filled`: anything was computed yet. `skips`: reused in a row. `change`: the change that the
        last decision saw, for the report; nan where the rule looks at nothing.
        """
        del value
        return {
            "filled": torch.tensor(False), "skips": torch.tensor(0),
            "change": torch.tensor(math.nan),
            **{name: torch.tensor(begin) for name, begin in self.sums.items()},
        }  # fmt: skip

    def decide(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """Whether step `step` (an integer scalar) is computed, a boolean scalar.

        `value` is the signal that the policy asks for.
        """
        compute, state = self._wish(state, value, step)
        compute = compute | ~state["filled"] | self.protects(step)
        if self.max_skips is not None:
            compute = compute | (state["skips"] >= self.max_skips)
        return compute, state

    def protects(self, step: torch.Tensor) -> torch.Tensor:
        """Whether the step is one that is always computed."""
        return (step < self.protect_first) | (step >= self.num_steps - self.protect_last)

    def computed(
        self, state: State, value: torch.Tensor | None, old: Sequence[State],
        kept: Sequence[State], step: torch.Tensor,
    ) -> State:  # fmt: skip
        """The state after a computed step.

        Args:
            state, value, step: as in `decide`.
            old, kept: what `keep` was given and has returned, of the main stream of each segment.
        """
        del value, old, kept, step
        return {
            **state, "filled": torch.ones_like(state["filled"]),
            "skips": torch.zeros_like(state["skips"]),
            **{name: torch.full_like(state[name], begin) for name, begin in self.sums.items()},
        }  # fmt: skip

    def reused(self, state: State, after: torch.Tensor) -> State:
        """The state after a step that was reused and gave `after`."""
        del after
        return {**state, "skips": state["skips"] + 1}

    def blank(self, before: torch.Tensor, after: torch.Tensor) -> State:
        """What is kept of a stream in front of the first computed step."""
        del before
        return {"residual": torch.zeros_like(after)}

    def keep(
        self, old: State, before: torch.Tensor, after: torch.Tensor, step: torch.Tensor
    ) -> State:
        """What a later step needs of one stream that was `before` and became `after`."""
        del old, step
        return {"residual": after - before}

    def reuse(self, kept: State, before: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """What stands for the blocks' output of a stream that is `before`."""
        del step
        return before + kept["residual"]

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """Whether the policy's own rule asks to compute."""
        raise NotImplementedError
