"""What a cache keeps of one guidance branch of one model, from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vcompress.compress.cache.contract import Outputs
from vcompress.compress.cache.policies.base import State

__all__ = ["BranchState", "Member", "Segment", "same"]


@dataclass(frozen=True)
class Member:
    """One block of a segment: the argument that each output carries on, and the outputs' form."""

    names: tuple[str | None, ...]
    form: Outputs


@dataclass(frozen=True)
class Segment:
    """Blocks that hand their streams straight to each other; the first one adds for all of them.

    Attributes:
        members: by place in the stack; the lowest is the first.
        kept: of each output of the last block; None where it returned none.
        main: index of the output that carries the hidden stream.
    """

    members: Mapping[int, Member]
    kept: tuple[State | None, ...]
    main: int

    @property
    def start(self) -> int:
        """Place of the first block."""
        return min(self.members)


@dataclass
class BranchState:
    """Everything that is kept.

    Attributes:
        decisions: states of the policy's rule, by the place of the block that decides.
        segments: by the place of their first block.
        num_blocks: how many blocks one call ran; None before the first.
        was_reused: by place, whether the last step was.
        latent: the model's input at the last step.
        conditions: all other arguments of the model, but the timestep.
        template: what the model returned, for policies that leave out the whole of it.
    """

    decisions: dict[int, State] = field(default_factory=dict)
    segments: dict[int, Segment] = field(default_factory=dict)
    num_blocks: int | None = None
    was_reused: dict[int, bool] = field(default_factory=dict)
    latent: torch.Tensor | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    template: Any = None

    def clear(self) -> None:
        """Forget what was computed."""
        self.decisions, self.segments, self.was_reused = {}, {}, {}

    def segment_at(self, place: int) -> Segment | None:
        """The segment that the block at `place` is in."""
        for segment in self.segments.values():
            if place in segment.members:
                return segment
        return None

    @property
    def num_bytes(self) -> int:
        """Of all tensors that policies keep; those kept twice count once."""
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in self._tensors()}
        return sum(sizes.values())

    def _tensors(self) -> Iterator[torch.Tensor]:
        for state in self.decisions.values():
            yield from state.values()
        for segment in self.segments.values():
            for kept in segment.kept:
                yield from (kept or {}).values()


def same(first: Any, second: Any) -> bool:
    """Whether two arguments are equal; tensors are compared only if they are not the same one."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        alike = (first.shape, first.dtype, first.device) == (
            second.shape, second.dtype, second.device,
        )  # fmt: skip
        return alike and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    # Anything else that cannot be compared counts as new: then the cache begins again.
    return isinstance(first, bool | int | float | str | torch.dtype) and first == second
