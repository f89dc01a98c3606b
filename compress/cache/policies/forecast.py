"""Forecast: the model's output is a fixed mixture of its last computed outputs.

Source: the idea of TaylorSeer (Liu et al., 2025, arXiv:2503.06923), to continue what was computed
instead of keeping it, and of LeMiCa (Gao et al., 2025, arXiv:2511.00090), to choose the computed
steps beforehand. What we changed: weights come from least squares over calibration runs instead of
a Taylor expansion, which they contain (a line is 2, -1); the output of the whole model is
continued, which is smoother than what the blocks add, and a reused step does not even embed its
input.

    compute step n   if n is on the list
    reuse            y_n = sum over i < 3 of a_(n,i) y_(c_i),   c_0 > c_1 > c_2 the last computed

The weights of a step are for one history. Where the computed steps are not those of the list, as
after a break in a run, everything is computed. `compress.cache.schedule` finds list and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vcompress.compress.cache.policies.base import Level, Policy, Signal, State, is_listed
from vcompress.spec.cache_section import MOST_WEIGHTS

__all__ = ["DEPTH", "Forecast", "histories"]

DEPTH = MOST_WEIGHTS
_NONE = -1


def histories(
    compute_steps: tuple[int, ...], mixture: tuple[tuple[float, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """For every step the computed ones that its weights are for, newest first, -1 for none."""
    found = []
    for step, weights in enumerate(mixture):
        before = [each for each in compute_steps if each < step][: -len(weights) - 1 : -1]
        found.append((*before, *(_NONE,) * (DEPTH - len(before))))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Forecast(Policy):
    """See the module.

    Attributes:
        compute_steps: the computed steps.
        mixture: for every step up to three weights, of the newest output first; none where it is
            computed.
    """

    level: ClassVar[Level] = "model"
    signal: ClassVar[Signal] = "input"

    compute_steps: tuple[int, ...]
    mixture: tuple[tuple[float, ...], ...]

    def start(self, value: torch.Tensor | None) -> State:
        """Adds `at`, the last computed steps, newest first."""
        return {**super().start(value), "at": torch.full((DEPTH,), _NONE)}

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del value
        known = min(len(self.mixture), self.num_steps)
        if not known:
            return torch.tensor(True), state
        expected = torch.tensor(histories(self.compute_steps, self.mixture))
        row = expected[step.clamp(max=known - 1)]
        # Weights for fewer outputs do not look at the older ones.
        fits = ((row == _NONE) | (row == state["at"])).all() & (row[0] != _NONE)
        return is_listed(self.compute_steps, step) | ~fits | (step >= known), state

    def computed(
        self, state: State, value: torch.Tensor | None, old: object, kept: object,
        step: torch.Tensor,
    ) -> State:  # fmt: skip
        """The step is the newest that was computed."""
        state = super().computed(state, value, (), (), step)
        return {**state, "at": torch.cat([step[None].to(state["at"]), state["at"][:-1]])}

    def blank(self, before: torch.Tensor, after: torch.Tensor) -> State:
        """No outputs yet."""
        del before
        return {f"output{index}": torch.zeros_like(after) for index in range(DEPTH)}

    def keep(
        self, old: State, before: torch.Tensor, after: torch.Tensor, step: torch.Tensor
    ) -> State:
        """The last outputs, newest first."""
        del before, step
        older = {f"output{index + 1}": old[f"output{index}"] for index in range(DEPTH - 1)}
        return {"output0": after, **older}

    def reuse(self, kept: State, before: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The mixture for `step`."""
        del before
        full = [(*weights, *(0.0,) * (DEPTH - len(weights))) for weights in self.mixture]
        table = torch.tensor(full, dtype=torch.float32)
        weights = table.index_select(0, step.reshape(1))[0]
        after = kept["output0"] * weights[0]
        for index in range(1, DEPTH):
            after = after + kept[f"output{index}"] * weights[index]
        return after
