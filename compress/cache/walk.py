"""One call of a model, block by block: what is computed, what is kept, what is used again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vcompress.compress.cache.contract import Outputs, bind, followed, outputs_of, streams
from vcompress.compress.cache.modulated import first_layer_input
from vcompress.compress.cache.policies.base import Policy, State
from vcompress.compress.cache.state import BranchState, Member, Segment
from vcompress.spec.errors import InputError

__all__ = ["BlockCall", "Walk"]


@dataclass(frozen=True)
class BlockCall:
    """A block that the model has called.

    Attributes:
        name: full name.
        block: the module.
        run: its own forward.
        signature: of `run`.
        positional, keywords: what it was given.
    """

    name: str
    block: nn.Module
    run: Callable[..., Any]
    signature: inspect.Signature
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self) -> Any:
        """Run it."""
        return self.run(*self.positional, **self.keywords)


@dataclass
class _Open:
    """A segment that is being computed."""

    arguments: Mapping[str, Any]
    members: dict[int, Member] = field(default_factory=dict)
    last: Outputs | None = None
    last_kind: type = nn.Module


class Walk:
    """Passes the blocks of one call, in their order.

    Args:
        policy: decides.
        branch: what is kept; changed in place.
        step: n.
        num_blocks: blocks of the model.
        is_active: False to compute everything and keep nothing.
        links: what is known of the contract, by class of block; changed in place.

    Attributes:
        changes: what the decisions saw.
    """

    def __init__(
        self, policy: Policy, branch: BranchState, step: int, *, num_blocks: int, is_active: bool,
        links: dict[type, dict[int, str]],
    ) -> None:  # fmt: skip
        self._policy, self._branch = policy, branch
        self._step = torch.tensor(step)
        self._front = policy.front_blocks
        self._back = (branch.num_blocks or num_blocks) - policy.back_blocks
        self._stacked = policy.level == "stack"
        self._is_active = is_active and policy.level != "model"
        self._links = links
        self.changes: list[float] = []
        self._place = 0
        self._skips = False
        self._value: torch.Tensor | None = None
        self._open: _Open | None = None
        self._old: list[State] = []
        self._kept: list[State] = []
        self._first: Mapping[str, Any] = {}
        self._before: Mapping[str, Any] = {}
        self._last: Outputs | None = None
        self._last_kind: type = nn.Module

    @property
    def place(self) -> int:
        """Of the block that comes next, or that is running."""
        return self._place

    def is_asked(self) -> bool:
        """Whether the policy decides about the next block."""
        return self._policy.level == "model" or self._front <= self._place < self._back

    def decides_to_skip(self, call: BlockCall) -> bool:
        """Whether the block is skipped; to be followed by `reused` or `computed`."""
        arguments = bind(call.signature, call.positional, call.keywords)
        self._join(arguments)
        inside = self._is_active and self.is_asked()
        if inside and (self._place == self._front or not self._stacked):
            self._skips = self._decide(call, arguments)
        return inside and self._skips

    def reused(self, call: BlockCall) -> Any:
        """What stands for the output of a skipped block."""
        arguments = bind(call.signature, call.positional, call.keywords)
        segment = self._branch.segment_at(self._place)
        assert segment is not None
        member = segment.members[self._place]
        if self._place == segment.start:
            tensors = [
                None
                if kept is None
                else self._policy.reuse(kept, _before(arguments, name, kept), self._step)
                for name, kept in zip(member.names, segment.kept, strict=True)
            ]
            if not self._stacked or self._place == self._front:
                self._settle_reuse(tensors[segment.main])
        else:
            tensors = [None if name is None else arguments[name] for name in member.names]
        outputs = Outputs(member.form.kind, tuple(tensors))
        self._leave(call, arguments, outputs)
        return outputs.rebuilt(tensors)

    def computed(self, call: BlockCall) -> Any:
        """Run the block; what it adds is kept."""
        arguments = bind(call.signature, call.positional, call.keywords)
        keeps = self._is_active and self._front <= self._place < self._back
        if keeps and self._open is None:
            self._open = _Open(arguments)
        versions = _versions(arguments)
        output = call()
        if not self._is_active:
            self._place += 1
            return output
        outputs = outputs_of(call.name, output)
        if _versions(arguments) != versions:
            message = (
                f"block {call.name} changes its input in place, so what it adds is not known; name "
                "other blocks in cache.blocks, or take the policy easycache"
            )
            raise InputError(message)
        if keeps:
            assert self._open is not None
            names = (
                self._open.members[self._place].names if self._place in self._open.members else ()
            )
            self._open.members[self._place] = Member(names, outputs.without_tensors())
            self._open.last, self._open.last_kind = outputs, type(call.block)
        self._leave(call, arguments, outputs)
        return output

    def finish(self) -> None:
        """The call is over."""
        if self._open is not None:
            self._close()
        branch = self._branch
        if self._kept and self._stacked:
            branch.decisions[self._front] = self._policy.computed(
                branch.decisions[self._front], self._value, self._old, self._kept, self._step
            )
        expected = branch.num_blocks
        branch.num_blocks = self._place
        if expected is not None and expected != self._place:
            # Blocks were left out or added: what was kept may stand for other blocks.
            branch.clear()

    def _leave(self, call: BlockCall, arguments: Mapping[str, Any], outputs: Outputs) -> None:
        if self._place == 0:
            self._first = arguments
        self._before, self._last, self._last_kind = arguments, outputs, type(call.block)
        self._place += 1

    def _join(self, arguments: Mapping[str, Any]) -> None:
        """Learn from what the next block is given; close the segment if it does not go on."""
        if self._last is None:
            return
        links = followed(self._last, arguments)
        if links:
            self._links.setdefault(self._last_kind, {}).update(links)
        if self._open is None:
            return
        count = sum(tensor is not None for tensor in self._last.tensors)
        if self._stacked and len(links) == count and self._place < self._back:
            names = tuple(links.get(index) for index in range(len(self._last.tensors)))
            self._open.members[self._place] = Member(names, self._last.without_tensors())
        else:
            self._close()

    def _close(self) -> None:
        opened, branch, policy = self._open, self._branch, self._policy
        assert opened is not None
        assert opened.last is not None
        self._open = None
        start = min(opened.members)
        names = streams(opened.arguments, opened.last, self._links.get(opened.last_kind, {}))
        opened.members[start] = Member(names, opened.members[start].form)
        before = branch.segments.get(start)
        goes_on = before is not None and before.members.keys() == opened.members.keys()
        kept: list[State | None] = []
        main = _main(names, opened.arguments)
        for index, (name, after) in enumerate(zip(names, opened.last.tensors, strict=True)):
            if after is None:
                kept.append(None)
                continue
            entering = _entering(opened.arguments, name, after)
            old = before.kept[index] if before is not None and goes_on else None
            if old is None:
                old = policy.blank(entering, after)
            new = policy.keep(old, entering, after.detach(), self._step)
            kept.append(new)
            if index == main:
                self._old.append(old)
                self._kept.append(new)
        branch.segments[start] = Segment(opened.members, tuple(kept), main)
        if not self._stacked:
            state = branch.decisions[start]
            branch.decisions[start] = policy.computed(
                state, None, self._old[-1:], self._kept[-1:], self._step
            )

    def _decide(self, call: BlockCall, arguments: Mapping[str, Any]) -> bool:
        self._value = self._signal(call, arguments)
        state = self._branch.decisions.get(self._place)
        if state is None:
            state = self._policy.start(self._value)
        is_filled = bool(state["filled"])
        compute, state = self._policy.decide(state, self._value, self._step)
        self._branch.decisions[self._place] = state
        change = float(state["change"])
        if is_filled and not math.isnan(change):
            self.changes.append(change)
        return not bool(compute) and self._branch.segment_at(self._place) is not None

    def _settle_reuse(self, after: torch.Tensor | None) -> None:
        assert after is not None
        decisions = self._branch.decisions
        decisions[self._place] = self._policy.reused(decisions[self._place], after)

    def _signal(self, call: BlockCall, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        if self._policy.signal == "modulated":
            tokens = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
            return first_layer_input(call.block, call, tokens).detach()
        if self._policy.signal == "front":
            assert self._last is not None
            names = streams(self._before, self._last, self._links.get(self._last_kind, {}))
            main = _main(names, self._before)
            name, after = names[main], self._last.tensors[main]
            assert name is not None
            assert after is not None
            entering = self._first.get(name)
            if not isinstance(entering, torch.Tensor) or entering.shape != after.shape:
                entering = self._before[name]
            return (after - entering).detach()
        return None


def _main(names: tuple[str | None, ...], arguments: Mapping[str, Any]) -> int:
    """The output whose stream comes first among the arguments."""
    order = list(arguments)
    places = [len(order) if name is None else order.index(name) for name in names]
    return places.index(min(places))


def _entering(arguments: Mapping[str, Any], name: str | None, after: torch.Tensor) -> torch.Tensor:
    """What the stream was; zero for an output that carries on nothing."""
    if name is None:
        return after.new_zeros(())
    entering = arguments[name]
    assert isinstance(entering, torch.Tensor)
    return entering.detach()


def _before(arguments: Mapping[str, Any], name: str | None, kept: State) -> torch.Tensor:
    like = next(tensor for tensor in kept.values() if tensor.ndim)
    return _entering(arguments, name, like)


def _versions(arguments: Mapping[str, Any]) -> list[int]:
    # Tensors of the inference mode do not count their changes.
    return [
        value._version
        for value in arguments.values()
        if isinstance(value, torch.Tensor) and not value.is_inference()
    ]
