"""One cached step without anything hidden: state in, state out, for graphs.

A live model runs under `Cached`, which skips blocks by not calling them. In an exported graph the
same policy stands between two branches of an If, and its state is input and output of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vcompress.compress.cache.policies.base import Policy, State

__all__ = ["cached_step"]


def cached_step(
    policy: Policy, run: Callable[[torch.Tensor], torch.Tensor], state: State, kept: State,
    value: torch.Tensor | None, before: torch.Tensor, step: torch.Tensor,
) -> tuple[torch.Tensor, State, State]:  # fmt: skip
    """What the blocks return, or what stands for it, and the next state.

    Args:
        policy: decides.
        run: the blocks, from the hidden stream to the hidden stream.
        state, kept: of the step before; at first `policy.start(value)` and `policy.blank(before,
            before)`.
        value: the signal that the policy asks for.
        before: what enters the blocks.
        step: n, an integer scalar.

    Returns:
        What leaves the blocks, state and kept; all of the shapes and types that they came with.
    """
    compute, state = policy.decide(state, value, step)
    # In front of the If: torch.export cannot translate a table of constants inside of a branch.
    stand_in = policy.reuse(kept, before, step)
    state_names, kept_names = list(state), list(kept)

    def split(flat: tuple[torch.Tensor, ...]) -> tuple[State, State]:
        count = len(state_names)
        return (
            dict(zip(state_names, flat[:count], strict=True)),
            dict(zip(kept_names, flat[count:], strict=True)),
        )

    def joined(after: torch.Tensor, state: State, kept: State) -> tuple[torch.Tensor, ...]:
        # The branches of a graph may not return what they were given.
        tensors = (after, *(state[name] for name in state_names), *kept.values())
        return tuple(tensor.clone() for tensor in tensors)

    def computed(
        before: torch.Tensor, _stand_in: torch.Tensor, step: torch.Tensor, *flat: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        state, kept = split(flat)
        after = run(before)
        now = policy.keep(kept, before, after, step)
        state = policy.computed(state, value, [kept], [now], step)
        return joined(after, state, {name: now[name] for name in kept_names})

    def reused(
        _before: torch.Tensor, stand_in: torch.Tensor, _step: torch.Tensor, *flat: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        state, kept = split(flat)
        return joined(stand_in, policy.reused(state, stand_in), kept)

    operands = (before, stand_in, step, *state.values(), *kept.values())
    after, *flat = torch.cond(compute, computed, reused, operands)
    return after, *split(tuple(flat))
