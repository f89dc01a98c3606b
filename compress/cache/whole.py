"""One call of a model whose policy decides about the model as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch

from vcompress.compress.cache.contract import Outputs
from vcompress.compress.cache.policies.base import Policy
from vcompress.compress.cache.state import BranchState, Member, Segment
from vcompress.models.video import primary_output

__all__ = ["WholeModel", "with_primary"]

_NAMES = ("logits", "sample", "last_hidden_state")
_FORM = Outputs(torch.Tensor, (None,))


class WholeModel:
    """Decides about one call; does nothing for policies that decide about blocks.

    Attributes:
        is_reused: whether the model is to be left out.
        changes: what the decision saw.
    """

    def __init__(
        self, policy: Policy, branch: BranchState, step: int, latent: torch.Tensor, *,
        is_active: bool,
    ) -> None:  # fmt: skip
        self._policy, self._branch = policy, branch
        self._step, self._latent = torch.tensor(step), latent
        self._is_active = is_active and policy.level == "model"
        self.is_reused = False
        self.changes: list[float] = []
        if self._is_active:
            state = branch.decisions.get(0) or policy.start(self._latent)
            compute, decided = policy.decide(state, self._latent, self._step)
            branch.decisions[0] = decided
            self.is_reused = not bool(compute)
            if bool(state["filled"]):
                self.changes.append(float(decided["change"]))

    def reused(self) -> Any:
        """What stands for the model's output."""
        kept = self._branch.segments[0].kept[0]
        assert kept is not None
        after = self._policy.reuse(kept, self._latent, self._step)
        self._branch.decisions[0] = self._policy.reused(self._branch.decisions[0], after)
        return with_primary(self._branch.template, after)

    def settle(self, output: Any) -> None:
        """Keep what a computed call returned."""
        if not self._is_active:
            return
        branch, policy = self._branch, self._policy
        after = primary_output(output).detach()
        before = branch.segments.get(0)
        old = None if before is None else before.kept[0]
        if old is None:
            old = policy.blank(self._latent, after)
        kept = policy.keep(old, self._latent, after, self._step)
        branch.segments[0] = Segment({0: Member((None,), _FORM)}, (kept,), 0)
        branch.template = output
        branch.decisions[0] = policy.computed(
            branch.decisions[0], self._latent, [old], [kept], self._step
        )


def with_primary(output: Any, tensor: torch.Tensor) -> Any:
    """`output`, of any form that a model returns, with `tensor` as its primary one."""
    if isinstance(output, torch.Tensor):
        return tensor
    for name in _NAMES:
        if isinstance(getattr(output, name, None), torch.Tensor):
            if isinstance(output, Mapping):
                return type(output)(**{**output, name: tensor})
            if is_dataclass(output) and not isinstance(output, type):
                return replace(output, **{name: tensor})
            changed = copy.copy(output)
            setattr(changed, name, tensor)
            return changed
    if isinstance(output, Mapping):
        first = next(iter(output))
        return {**output, first: with_primary(output[first], tensor)}
    return type(output)([with_primary(output[0], tensor), *output[1:]])
