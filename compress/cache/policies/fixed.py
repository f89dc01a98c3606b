"""Fixed schedule: one step of `interval` is computed, or exactly the steps of a list.

Source: the plain step reuse that DeepCache (Ma et al., 2023, arXiv:2312.00858) and the step masks
of LeMiCa (Gao et al., 2025, arXiv:2511.00090) come down to. It looks at nothing, so it is the
control that every policy which looks has to beat.

    compute step n   if reused in a row >= interval - 1   (or: if n is on the list)
    reuse            y_n = x_n + r_c
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.compress.cache.policies.base import Policy, State, is_listed

__all__ = ["Fixed"]


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    """See the module; base of the policies that know beforehand what they compute.

    Attributes:
        interval: at least 1; 1 computes everything.
        compute_steps: the computed steps, in place of `interval`.
    """

    interval: int
    compute_steps: tuple[int, ...] | None = None

    def _wish(
        self, state: State, value: torch.Tensor | None, step: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        del value
        if self.compute_steps is None:
            return state["skips"] >= self.interval - 1, state
        return is_listed(self.compute_steps, step), state
