"""Where in a generation a call of the model stands: its step, its guidance branch, or a new start.

All that is known comes with the calls: the timestep and, from pipelines that set one, the name of
the cache context ("cond", "uncond") with the step. The rules, in this order:

1. A call at the timestep of the one before is of the same step. If its context has been seen in
   this step already, a new generation has started. Without a name it is the next branch: the calls
   of one step are taken to come in one order.
2. A call at another timestep is the next step, if the timestep moves on in the direction in which
   it moved before (some schedules count up). Otherwise a new generation has started, as it has
   where the pipeline tells a step that is not behind the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Clock", "Tick"]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One call.

    Attributes:
        step: n, from 0.
        branch: name of the guidance branch.
        is_start: whether a new generation starts with it.
    """

    step: int
    branch: str
    is_start: bool


class Clock:
    """Counts the steps of one run; several models that take turns in it share one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The next call starts a generation."""
        self._timestep: float | None = None
        self._direction = 0.0
        self._step = -1
        self._seen: list[str] = []

    def tick(self, timestep: float, context: str | None = None, told: int | None = None) -> Tick:
        """Place a call; `told` is its step, if the pipeline says it."""
        if self._timestep is None or self._is_restart(timestep, context, told):
            return self.restart(timestep, context, told)
        if timestep != self._timestep:
            self._direction = timestep - self._timestep
            self._timestep = timestep
            self._step = self._step + 1 if told is None else told
            self._seen = []
        return Tick(step=self._step, branch=self._branch(context), is_start=False)

    def restart(self, timestep: float, context: str | None = None, told: int | None = None) -> Tick:
        """A call that starts a generation, whatever came before."""
        self.reset()
        self._timestep = timestep
        self._step = 0 if told is None else told
        return Tick(step=self._step, branch=self._branch(context), is_start=True)

    def _is_restart(self, timestep: float, context: str | None, told: int | None) -> bool:
        assert self._timestep is not None
        moved = timestep - self._timestep
        if moved == 0:
            return context in self._seen or told not in (None, self._step)
        return moved * self._direction < 0 or (told is not None and told <= self._step)

    def _branch(self, context: str | None) -> str:
        branch = f"call {len(self._seen) + 1}" if context is None else context
        self._seen.append(branch)
        return branch
