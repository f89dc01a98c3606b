"""Where a call of a denoiser stands in a run, judged by all that it was given.

The clock sees timesteps only. That a call belongs to another generation also shows in its latent,
which jumps as only new noise does, and in any other argument that has changed.
"""

from __future__ import annotations

from vcompress.compress.cache.clock import Clock, Tick
from vcompress.compress.cache.denoiser import Denoiser, ModelCall
from vcompress.compress.cache.policies.base import relative_l1
from vcompress.compress.cache.state import BranchState, same

__all__ = ["place"]

# Independent noise moves a latent by 1.4 of its size, a step of a sampler by 0.02 to 0.4.
_JUMP = 0.5


def place(clock: Clock, denoiser: Denoiser, call: ModelCall) -> tuple[Tick, str | None]:
    """The tick of `call`, and why it was taken to start a generation, if the clock did not say so.

    `denoiser.branches` hold the latent and the conditions of the call before.
    """
    told, context = denoiser.told_step, denoiser.context
    tick = clock.tick(call.timestep, context, told)
    if tick.is_start:
        return tick, None
    known = denoiser.branches.get(tick.branch)
    reason = None if known is None else _foreign(known, call)
    if known is None and context is None:
        # The branches of one step share their latent.
        first = denoiser.branches.get("call 1")
        reason = None if first is None else _new_noise(first, call)
    if reason is None:
        return tick, None
    note = f"a generation was taken to start at step {tick.step}, since {reason}"
    return clock.restart(call.timestep, context, told), note


def _foreign(branch: BranchState, call: ModelCall) -> str | None:
    """Why `call` is not of the generation that `branch` is from, or None."""
    if branch.conditions.keys() != call.conditions.keys():
        return "the model was called with other arguments"
    for name, value in call.conditions.items():
        if not same(branch.conditions[name], value):
            return f"{name} changed"
    return _new_noise(branch, call)


def _new_noise(branch: BranchState, call: ModelCall) -> str | None:
    """Why the latent of `call` does not go on from that of `branch`, or None."""
    old, new = branch.latent, call.latent
    assert old is not None
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return "the latent had another shape, type or device"
    if float(relative_l1(new, old)) > _JUMP:
        return "the latent jumped as only new noise does"
    return None
