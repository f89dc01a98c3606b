"""A denoiser with its cache in the graph: what is kept goes in and comes out.

    facts = export_cached(module, section, call, Path("cached.onnx"), num_steps=50)
    state = facts.first_state()
    for step, timestep in enumerate(timesteps):
        outputs = session.run_named({**call, "step": np.array([step]), **state})
        state = facts.next_state(outputs)

The stack of blocks stands in one branch of an If, what stands for it in the other, so a step that
reuses does not compute the blocks, in any runtime. Nothing is hidden: a new generation, or another
guidance branch, is another state. The same graph without the If is written on request as a pair, a
full and a cached step, for a host that decides.

Policies of the stack whose signal can be had in a graph: fixed, magcache, taylorseer, first_block;
of the whole model a schedule (forecast), whose cached step is a mixture of three kept outputs.
Everything has at least one axis, as servers that keep a state know no scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from vcompress.compress.cache.catalog import build_policy
from vcompress.compress.cache.policies.base import Policy, State
from vcompress.compress.cache.pure import cached_step
from vcompress.compress.cache.stack import find_stack
from vcompress.export.graph import DIALECTS, save_graph, tidy_graph, translate_program
from vcompress.export.trace import quiet
from vcompress.models.calls import Call
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import BuildError, InputError

__all__ = ["CachedFacts", "export_cached"]

Kind = Literal["if", "full", "cached"]
_STATE, _KEPT, _STEP, _OUTPUT = "state.", "kept.", "step", "output"
_SIGNALS = ("none", "front")


@dataclass(frozen=True, kw_only=True)
class CachedFacts:
    """What `export_cached` wrote.

    Attributes:
        files: the ONNX file first, then its external data, if any.
        kind: "if", "full" or "cached".
        start: the state in front of step 0, by the name of its input.
    """

    files: tuple[Path, ...]
    kind: Kind
    start: Mapping[str, npt.NDArray[Any]]

    def first_state(self) -> dict[str, npt.NDArray[Any]]:
        """Inputs for the first step of a generation."""
        return {name: value.copy() for name, value in self.start.items()}

    def next_state(self, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Inputs for the next step, from all outputs of this one."""
        return {name: outputs[f"next.{name}"] for name in self.start}


class _Denoiser(nn.Module):
    """One step of a denoiser: its call, n, what is kept; and the same after the step."""

    def __init__(
        self, module: nn.Module, policy: Policy, blocks: tuple[str, ...], kind: Kind
    ) -> None:
        super().__init__()
        self.module, self.policy, self.kind = module, policy, kind
        self.names = blocks
        # Numbers of the state, which are tensors of one element outside.
        self.scalars: frozenset[str] = frozenset()

    def forward(
        self, call: dict[str, torch.Tensor], step: torch.Tensor, state: State, kept: State
    ) -> tuple[torch.Tensor, State, State]:
        inside = {
            name: value[0] if name in self.scalars else value for name, value in state.items()
        }
        output, after, kept = self._run(call, step[0], inside, kept)
        outside = {
            name: value.reshape(1) if name in self.scalars else value
            for name, value in after.items()
        }
        return output, outside, kept

    def _run(
        self, call: dict[str, torch.Tensor], step: torch.Tensor, state: State, kept: State
    ) -> tuple[torch.Tensor, State, State]:
        if self.policy.level == "model":
            return self._whole(call, step, state, kept)
        result: list[tuple[State, State]] = []

        def stack(
            run: Callable[[torch.Tensor], torch.Tensor], entered: torch.Tensor, before: torch.Tensor
        ) -> torch.Tensor:
            value = before - entered if self.policy.signal == "front" else None
            after, *rest = self._step(run, state, kept, value, before, step)
            result.append((rest[0], rest[1]))
            return after

        with _replaced(self.module, self.names, self.policy, stack):
            output = self.module(call)
        (after,) = result
        return output, *after

    def _whole(
        self, call: dict[str, torch.Tensor], step: torch.Tensor, state: State, kept: State
    ) -> tuple[torch.Tensor, State, State]:
        """The model itself stands where else its blocks do; its first tensor is the latent."""
        latent, *rest = call

        def run(before: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.module({latent: before, **{n: call[n] for n in rest}})
            return output

        value = call[latent] if self.policy.signal == "input" else None
        return self._step(run, state, kept, value, call[latent], step)

    def _step(
        self, run: Callable[[torch.Tensor], torch.Tensor], state: State, kept: State,
        value: torch.Tensor | None, before: torch.Tensor, step: torch.Tensor,
    ) -> tuple[torch.Tensor, State, State]:  # fmt: skip
        policy = self.policy
        if self.kind == "if":
            return cached_step(policy, run, state, kept, value, before, step)
        _, state = policy.decide(state, value, step)
        if self.kind == "cached":
            after = policy.reuse(kept, before, step)
            return after, policy.reused(state, after), {k: v.clone() for k, v in kept.items()}
        after = run(before)
        now = policy.keep(kept, before, after, step)
        state = policy.computed(state, value, [kept], [now], step)
        return after, state, {name: now[name] for name in kept}


@contextmanager
def _replaced(
    module: nn.Module, names: tuple[str, ...], policy: Policy,
    stack: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor],
                    torch.Tensor],
) -> Any:  # fmt: skip
    """Let the first block that may be skipped stand for all of them, for a while."""
    blocks = [module.get_submodule(name) for name in names]
    end = len(blocks) - policy.back_blocks
    middle = blocks[policy.front_blocks : end]
    originals = [block.forward for block in middle]
    entered: list[torch.Tensor] = []
    first = blocks[0].forward

    def enter(hidden: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        entered.append(hidden)
        return first(hidden, *rest, **keywords)

    def all_of_them(hidden: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
        def run(value: torch.Tensor) -> torch.Tensor:
            for forward in originals:
                value = forward(value, *rest, **keywords)
                if not isinstance(value, torch.Tensor):
                    message = (
                        "a cache in the graph needs blocks that hand on one stream of tokens, got "
                        f"{type(value).__name__}; cache this model in Python with apply_cache"
                    )
                    raise InputError(message)
            return value

        return stack(run, entered[0] if entered else hidden, hidden)

    def hand_on(hidden: torch.Tensor, *_rest: Any, **_keywords: Any) -> torch.Tensor:
        return hidden

    try:
        if policy.front_blocks:
            blocks[0].forward = enter
        middle[0].forward = all_of_them
        for block in middle[1:]:
            block.forward = hand_on
        yield
    finally:
        for block in (blocks[0], *middle):
            block.__dict__.pop("forward", None)


def export_cached(
    module: nn.Module, section: CacheSection, call: Call, path: Path, *, num_steps: int,
    dialect: str = "portable", kind: Kind = "if",
) -> CachedFacts:  # fmt: skip
    """Write one step of a denoiser with its cache as an ONNX graph.

    Args:
        module: takes the tensors of a call in a dictionary and returns one tensor, as
            `VideoModel.module` inside `PrimaryOutput` does.
        section: policy and settings.
        call: an example; sizes are fixed to its own.
        path: of the file.
        num_steps: N of the run.
        dialect: of `export.graph.DIALECTS`.
        kind: "if" decides in the graph; "full" always computes and "cached" never does, for a host
            that decides: both take and give the same state, so they can take turns.

    Raises:
        InputError: a policy whose signal a graph cannot have, or blocks with several streams.
        BuildError: the step cannot be traced or translated.
    """
    policy = build_policy(section, num_steps)
    _check(section, policy)
    blocks = () if policy.level == "model" else find_stack(module, section.blocks)
    step = _Denoiser(module.eval(), policy, blocks, kind)
    arguments = _outside(step, *_arguments(step, call))
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(step, arguments, strict=False)
        except InputError:
            raise
        except Exception as error:  # torch.export lets through whatever the module raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"torch.export cannot trace the cached {type(module).__name__}: {reason}"
            raise BuildError(message) from error
        model = translate_program(program, DIALECTS[dialect])
        tidy_graph(model, program)
    _, _, state, kept = arguments
    names = [*(f"{_STATE}{name}" for name in state), *(f"{_KEPT}{name}" for name in kept)]
    _name(model, [*arguments[0], _STEP, *names], [_OUTPUT, *(f"next.{name}" for name in names)])
    start = dict(zip(names, [*state.values(), *kept.values()], strict=True))
    inputs = {value.name for value in model.graph.inputs}
    return CachedFacts(
        files=save_graph(model, path),
        kind=kind,
        start=MappingProxyType(
            {name: value.numpy().copy() for name, value in start.items() if name in inputs}
        ),
    )


def _check(section: CacheSection, policy: Policy) -> None:
    if section.policy == "forecast" or (policy.level == "stack" and policy.signal in _SIGNALS):
        return
    message = (
        f"the policy {section.policy} cannot stand in a graph; take a schedule (forecast), fixed, "
        "magcache, taylorseer or first_block, or cache in Python with apply_cache"
    )
    raise InputError(message)


def _arguments(
    step: _Denoiser, call: Call
) -> tuple[dict[str, torch.Tensor], torch.Tensor, State, State]:
    """Inputs of the traced step, found by running model or blocks once in full."""
    first = torch.tensor(0)
    if step.policy.level == "model":
        latent = next(iter(call.flat.values()))
        with torch.no_grad():
            after = step.module(call.flat)
        return call.flat, first, step.policy.start(latent), step.policy.blank(latent, after)
    kind, step.kind = step.kind, "full"
    found: dict[str, torch.Tensor] = {}

    def look(
        run: Callable[[torch.Tensor], torch.Tensor], entered: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        found["before"], found["value"] = before, before - entered
        return run(before)

    with torch.no_grad(), _replaced(step.module, step.names, step.policy, look):
        step.module(call.flat)
    step.kind = kind
    value = found["value"] if step.policy.signal == "front" else None
    state = step.policy.start(value)
    kept = step.policy.blank(found["before"], found["before"])
    return call.flat, first, state, kept


def _outside(
    step: _Denoiser, call: dict[str, torch.Tensor], number: torch.Tensor, state: State, kept: State
) -> tuple[dict[str, torch.Tensor], torch.Tensor, State, State]:
    """The same with one axis for every scalar."""
    step.scalars = frozenset(name for name, value in state.items() if not value.ndim)
    return (
        call,
        number.reshape(1),
        {name: value if value.ndim else value.reshape(1) for name, value in state.items()},
        kept,
    )


def _name(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
