"""What a layer may ask of the cache while its block runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Moment"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a run a block computes, for layers whose precision depends on it.

    Attributes:
        block: full name of the running block.
        branch: guidance branch; what is remembered from step to step must be kept per branch.
        generation: counts from 1; what is remembered from another one must not be used.
        step: n, from 0.
        num_steps: of the run.
        is_protected: the policy computes this step whatever it sees.
        is_writing: what the block adds now may be used again in the next step (first rule of
            purified delta refresh).
        after_reuse: the block was skipped in the step before, so what was measured of it then is
            stale (second rule).
    """

    block: str
    branch: str
    generation: int
    step: int
    num_steps: int
    is_protected: bool
    is_writing: bool
    after_reuse: bool
