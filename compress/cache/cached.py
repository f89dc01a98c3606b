"""A cache that works: it stands between a pipeline and its denoisers, and says what it did."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from vcompress.compress.cache.clock import Clock, Tick
from vcompress.compress.cache.denoiser import Denoiser, ModelCall
from vcompress.compress.cache.gates import ForwardGate, SchedulerGate, install, uninstall
from vcompress.compress.cache.moment import Moment
from vcompress.compress.cache.place import place
from vcompress.compress.cache.policies.base import Policy, State
from vcompress.compress.cache.report import CacheReport, Tally
from vcompress.compress.cache.state import BranchState
from vcompress.compress.cache.walk import BlockCall, Walk
from vcompress.compress.cache.whole import WholeModel
from vcompress.models.video import primary_output
from vcompress.spec.cache_section import LEAST_STEPS
from vcompress.spec.errors import InputError

__all__ = ["Cached", "Listener"]

# Denoiser, branch, generation, step, the state of the policy's rule after it, and the output.
Listener = Callable[[str, str, int, int, State, torch.Tensor], None]


class Cached:
    """The handle on an applied cache.

    What is kept belongs to one guidance branch of one generation. It is forgotten when a generation
    starts (see `clock`), when the latent has another shape, type or device or jumps as only new
    noise does, when any other argument of the model changes, and when a call fails.

    Decisions are made for the batch as a whole.
    """

    def __init__(
        self, name: str, denoisers: Mapping[str, Denoiser], build: Callable[[int], Policy],
        num_steps: int | None, notes: Callable[[int], tuple[str, ...]] = lambda _: (),
        listener: Listener | None = None, *, shared_by: int = 1,
    ) -> None:  # fmt: skip
        """For `apply_cache`.

        Args:
            build, notes: make the policy for a number of steps, and say what there is to it.
            shared_by: denoisers over which steps count on. Where this cache has fewer, steps are
                known only from a pipeline that tells them.
        """
        self._shared_by = shared_by
        self._name, self._build, self._notes, self._listener = name, build, notes, listener
        self._denoisers = list(denoisers.values())
        self._section_steps, self._told_steps = num_steps, None
        self._policies: dict[int, Policy] = {}
        self._clock = Clock()
        self._tally = Tally()
        self._walk: Walk | None = None
        self._branch: BranchState | None = None
        self._tick: Tick | None = None
        self._moment: Moment | None = None
        self._scheduler_gate: tuple[Any, SchedulerGate] | None = None
        for denoiser in self._denoisers:
            denoiser.install(self._run_model, self._run_block)

    _told_steps: int | None

    def follow(self, scheduler: Any) -> None:
        """Start a generation whenever `scheduler.set_timesteps` is called, with its steps."""
        gate = SchedulerGate(scheduler, self.reset)
        self._scheduler_gate = (scheduler, gate)
        install(scheduler, "set_timesteps", gate)

    def reset(self, num_steps: int | None = None) -> None:
        """Forget everything: the next call starts a generation, of `num_steps` if it is given."""
        self._clock.reset()
        self._told_steps = self._told_steps if num_steps is None else num_steps
        for denoiser in self._denoisers:
            denoiser.branches = {}

    def remove(self) -> None:
        """Make the models what they were; the report stays."""
        for denoiser in self._denoisers:
            denoiser.uninstall()
        if self._scheduler_gate is not None:
            scheduler, gate = self._scheduler_gate
            uninstall(scheduler, "set_timesteps", gate)
            self._scheduler_gate = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def moment(self) -> Moment | None:
        """Where in the run the block is that computes now; None outside of blocks."""
        return self._moment

    def report(self) -> CacheReport:
        """What was done since the cache was applied.

        Warns if nothing was reused.

        Raises:
            InputError: the cache was never asked.
        """
        blocks = tuple(
            denoiser.full_name(name)
            for denoiser in self._denoisers
            for name in denoiser.blocks or ("model",)
        )
        report = self._tally.report(self._name, blocks)
        if not report.consulted.any():
            raise InputError(self._never_asked())
        if not report.hits.any():
            warnings.warn(self._no_hits(report), stacklevel=2)
        return report

    def _never_asked(self) -> str:
        if not self._tally.model_calls:
            return (
                f"the cache {self._name} was never consulted: the model that it was applied to was "
                "not called; apply it to the very module that the pipeline calls, and run that"
            )
        return (
            f"the cache {self._name} was never consulted: the model ran, but none of its blocks "
            f"({self._denoisers[0].blocks[0]}, ...) was called; name the blocks that run in "
            "cache.blocks"
        )

    def _no_hits(self, report: CacheReport) -> str:
        seen = [
            change
            for changes in report.changes.values()
            for change in changes
            if change == change
        ]  # fmt: skip
        why = "; ".join(report.notes) or "every step was protected or changed too much"
        least = f"; smallest change of a step {min(seen):.4g}" if seen else ""
        return (
            f"the cache {self._name} reused nothing in {report.num_generations} generations: "
            f"{why}{least}; raise the threshold, protect fewer steps, or do without a cache"
        )

    def _run_model(
        self, denoiser: Denoiser, gate: ForwardGate, positional: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:  # fmt: skip
        if self._walk is not None:
            return gate.run(*positional, **keywords)
        call = denoiser.read(gate, positional, keywords)
        num_steps = self._num_steps(denoiser)
        policy = self._policies.setdefault(num_steps, self._build(num_steps))
        is_active = self._is_placed(denoiser) and num_steps >= LEAST_STEPS
        is_active = is_active or self._listener is not None
        try:
            tick = self._place(denoiser, call)
            self._note(denoiser, num_steps, tick, is_active=is_active)
            branch = denoiser.branches.setdefault(tick.branch, BranchState())
            # A pipeline may go on working on its latent in place.
            latent = call.latent.detach().clone()
            branch.latent, branch.conditions = latent, call.conditions
            self._walk = Walk(
                policy, branch, tick.step, num_blocks=len(denoiser.blocks), is_active=is_active,
                links=denoiser.links,
            )  # fmt: skip
            self._branch, self._tick = branch, tick
            whole = WholeModel(policy, branch, tick.step, latent, is_active=is_active)
            if whole.is_reused:
                output = whole.reused()
            else:
                output = gate.run(*positional, **keywords)
                whole.settle(output)
                self._walk.finish()
            self._count(denoiser, whole, tick, output)
        except BaseException:
            # Whatever a broken call has left behind must not reach the next one.
            self.reset()
            raise
        finally:
            self._walk = self._branch = self._tick = None
        return output

    def _run_block(
        self, denoiser: Denoiser, gate: ForwardGate, positional: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:  # fmt: skip
        walk, tick, branch = self._walk, self._tick, self._branch
        if walk is None or tick is None or branch is None:
            return gate.run(*positional, **keywords)
        block = denoiser.module.get_submodule(gate.name)
        call = BlockCall(gate.name, block, gate.run, gate.signature, positional, keywords)
        place, asked = walk.place, walk.is_asked()
        is_hit = walk.decides_to_skip(call)
        name = denoiser.full_name(gate.name)
        self._tally.count(tick.branch, name, tick.step, asked=asked, hit=is_hit)
        if is_hit:
            output = walk.reused(call)
        else:
            self._moment = self._moment_of(denoiser, name, branch.was_reused.get(place, False))
            try:
                output = walk.computed(call)
            finally:
                self._moment = None
        branch.was_reused[place] = is_hit
        return output

    def _is_placed(self, denoiser: Denoiser) -> bool:
        """Whether its steps can be counted."""
        return denoiser.told_step is not None or len(self._denoisers) >= self._shared_by

    def _num_steps(self, denoiser: Denoiser) -> int:
        told = denoiser.told_num_steps or self._told_steps or self._section_steps
        if told is None:
            message = (
                "the number of denoising steps is not known: the pipeline does not tell it; give "
                "num_steps in the section, or scheduler=pipe.scheduler to apply_cache"
            )
            raise InputError(message)
        return told

    def _place(self, denoiser: Denoiser, call: ModelCall) -> Tick:
        tick, note = place(self._clock, denoiser, call)
        if note is not None:
            self._tally.notes[note] = None
        if tick.is_start:
            for each in self._denoisers:
                each.branches = {}
            self._tally.start()
        return tick

    def _note(self, denoiser: Denoiser, num_steps: int, tick: Tick, *, is_active: bool) -> None:
        notes = [*self._notes(num_steps)]
        if not self._is_placed(denoiser):
            notes.append(
                f"the steps count on over {self._shared_by} denoisers, and the pipeline does not "
                "tell where this one begins, so everything is computed; call "
                "vcompress.cached(pipe, ...), which gives them one cache"
            )
        elif not is_active:
            notes.append(
                f"caching cannot pay in {num_steps} steps, of which no two are alike; everything "
                f"is computed below {LEAST_STEPS}"
            )
        if tick.step >= num_steps:
            notes.append(
                f"the run goes on after step {num_steps - 1}, though num_steps is {num_steps}"
            )
        if denoiser.context is None and tick.branch != "call 1":
            notes.append(
                "the calls of a step have no cache context; branches are told apart by their order"
            )
        self._tally.notes.update(dict.fromkeys(notes))
        self._tally.model_calls[denoiser.name] += 1

    def _count(self, denoiser: Denoiser, whole: WholeModel, tick: Tick, output: Any) -> None:
        assert self._walk is not None
        assert self._branch is not None
        if whole.is_reused or not denoiser.blocks:
            for place, block in enumerate(denoiser.blocks or ("model",)):
                name, hit = denoiser.full_name(block), whole.is_reused
                self._tally.count(tick.branch, name, tick.step, asked=True, hit=hit)
                self._branch.was_reused[place] = hit
        for change in (*self._walk.changes, *whole.changes):
            self._tally.note_change(tick.branch, tick.step, change)
        kept = (branch for each in self._denoisers for branch in each.branches.values())
        self._tally.state_bytes = max(
            self._tally.state_bytes, sum(branch.num_bytes for branch in kept)
        )
        if self._listener is not None:
            for state in self._branch.decisions.values():
                self._listener(
                    denoiser.name, tick.branch, self._tally.num_generations, tick.step, state,
                    primary_output(output),
                )  # fmt: skip

    def _moment_of(self, denoiser: Denoiser, name: str, after_reuse: bool) -> Moment:
        tick, num_steps = self._tick, self._num_steps(denoiser)
        assert tick is not None
        policy = self._policies[num_steps]
        now, then = (bool(policy.protects(torch.tensor(tick.step + ahead))) for ahead in (0, 1))
        return Moment(
            block=name, branch=tick.branch, generation=self._tally.num_generations, step=tick.step,
            num_steps=num_steps, is_protected=now, after_reuse=after_reuse,
            is_writing=num_steps >= LEAST_STEPS and not then,
        )  # fmt: skip
