"""Dynamic mixed precision: how finely a block's inputs are rounded is decided in every step.

What: weights stay in NVFP4, stored once. In each step a block's layers round their inputs to NVFP4
if the error that this makes is predicted to be at most a threshold, and to eight bits otherwise
(see `spec.dynamic_section`). It is predicted by a line from a signal of block l in step t:

    added = |y - x| / |x| in step t - 1, where y is what the block made of x     (means of |.|)
    moved = |x - x'| / |x'|, where x enters it in step t and x' did in step t - 1

Source: 6Bit-Diffusion (https://arxiv.org/abs/2603.18742), its dynamic mixed precision with "added",
and two rules of its purified delta refresh: what a cache keeps is made from inputs that are not
rounded where they have outliers, and after a step that was left out, whose signal is stale, inputs
have eight bits. What we changed: one line a block instead of a layer, a rotation only where the
plan has one; "moved" is ours. Formats are simulated.

What is remembered belongs to one guidance branch of one generation, as in `compress.cache`, by the
same rules (`cache.place`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from vcompress.compress.cache.apply import cache_of
from vcompress.compress.cache.clock import Clock, Tick
from vcompress.compress.cache.denoiser import Denoiser
from vcompress.compress.cache.gates import ForwardGate
from vcompress.compress.cache.place import place
from vcompress.compress.cache.policies.base import relative_l1
from vcompress.compress.cache.state import BranchState
from vcompress.compress.dynamic.layers import (
    carried,
    changing_layers,
    hidden_of,
    input_bits,
    output_channels,
)
from vcompress.compress.dynamic.tally import PrecisionReport, Tally
from vcompress.compress.frozen import FrozenLinear
from vcompress.spec.dynamic_section import STORED, DynamicSection
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT

__all__ = ["DynamicPrecision", "Running", "apply_dynamic", "dynamic_precision_of"]


@dataclass
class _Seen:
    """What is known of a block from the last step in which it was computed."""

    step: int
    added: float | None = None
    entered: torch.Tensor | None = None


@dataclass
class Running:
    """The block that runs now."""

    block: str
    entering: torch.Tensor | None
    four_bits: bool
    has_run: bool = False


@dataclass
class _Layer:
    """A linear layer: the block whose precision it follows, if it does, and its output channels."""

    block: str | None
    channels: int
    bits: int


class DynamicPrecision:
    """The handle on dynamic precision that was applied; `remove` ends it."""

    def __init__(self, module: nn.Module, section: DynamicSection, timestep: str | None) -> None:
        """For `apply_dynamic`."""
        if dynamic_precision_of(module) is not None:
            message = (
                f"{type(module).__name__} has dynamic precision already; call remove() of the one "
                "that apply_dynamic returned first"
            )
            raise InputError(message)
        self._module, self.section = module, section
        self._blocks = tuple(section.blocks)
        self._layers = changing_layers(module, self._blocks)
        self._denoiser = Denoiser.of("", module, self._blocks, timestep)
        # Never in place: it knows the names of the arguments.
        self._gate = ForwardGate("", module.forward, _never)
        self._clock, self._tally = Clock(), Tally()
        self._seen: dict[str, dict[str, _Seen]] = {}
        self._tick: Tick | None = None
        self._running: Running | None = None
        self._handles: list[Any] = []
        self._install()

    def _install(self) -> None:
        add, module = self._handles.append, self._module
        add(module.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(module.register_forward_hook(self._after_model))
        for name in self._blocks:
            block = module.get_submodule(name)
            before, after = partial(self._before_block, name), partial(self._after_block, name)
            add(block.register_forward_pre_hook(before, with_kwargs=True))
            add(block.register_forward_hook(after, with_kwargs=True))
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | FrozenLinear):
                block_of = next((b for b, own in self._layers.items() if name in own), None)
                known = _Layer(block_of, output_channels(layer), input_bits(layer))
                before = partial(self._before_layer, known)
                add(layer.register_forward_pre_hook(before, with_kwargs=True))
                if block_of is not None:
                    layer.input_format = self.section.fine

    def reset(self) -> None:
        """Forget everything: the next call starts a generation."""
        self._clock.reset()
        self._forget()

    def _forget(self) -> None:
        self._seen, self._running, self._tick = {}, None, None
        self._denoiser.branches = {}

    def remove(self) -> None:
        """Make the module what it was; the report stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._changing():
            layer.input_format = layer.format
        self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _changing(self) -> list[FrozenLinear]:
        found = (self._module.get_submodule(n) for own in self._layers.values() for n in own)
        return [layer for layer in found if isinstance(layer, FrozenLinear)]

    def counted(self) -> PrecisionReport:
        """What was done since it was applied, as it is."""
        return self._tally.report(self._blocks)

    def report(self) -> PrecisionReport:
        """What was done since it was applied.

        Warns if no step ran in four bits.

        Raises:
            InputError: the module never ran.
        """
        report = self.counted()
        if not report.work.any():
            message = (
                "dynamic precision was never asked: the module that it was applied to was not "
                "called; apply it to the very module that the pipeline calls, and run that"
            )
            raise InputError(message)
        if not report.share:
            message = (
                "dynamic precision rounded no input to four bits: every step was protected, or "
                f"predicted above {self.section.threshold:.4g}; raise the threshold or do without"
            )
            warnings.warn(message, stacklevel=2)
        return report

    def _before_model(
        self, module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._tick is not None:
            # The call before did not end, and what it has left behind is of no use.
            self.reset()
        call = self._denoiser.read(self._gate, positional, keywords)
        tick, _ = place(self._clock, self._denoiser, call)
        if tick.is_start:
            self._forget()
            self._tally.num_generations += 1
        state = self._denoiser.branches.setdefault(tick.branch, BranchState())
        # A pipeline may go on working on its latent in place.
        state.latent, state.conditions = call.latent.detach().clone(), call.conditions
        self._tick = tick

    def _after_model(self, *_: Any) -> None:
        self._tick = self._running = None

    def _before_block(
        self, name: str, _block: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._tick is None:
            return
        entering = hidden_of(positional, keywords)
        signal = self._signal(name, entering)
        four_bits = self.section.takes_four_bits(name, self._tick.step, signal)
        self._running = Running(name, entering, four_bits)

    def _signal(self, name: str, entering: torch.Tensor | None) -> float | None:
        assert self._tick is not None
        seen = self._seen.get(self._tick.branch, {}).get(name)
        if seen is None or seen.step != self._tick.step - 1:
            return None
        if self.section.signal == "moved":
            before = seen.entered
            if before is None or entering is None or before.shape != entering.shape:
                return None
            return float(relative_l1(entering, before))
        return seen.added

    def _after_block(
        self, name: str, _block: nn.Module, _positional: tuple[Any, ...],
        _keywords: dict[str, Any], output: Any,
    ) -> None:  # fmt: skip
        running, tick = self._running, self._tick
        self._running = None
        if running is None or tick is None or not running.has_run:
            return
        seen, entering = _Seen(tick.step), running.entering
        if entering is not None and self.section.signal == "moved":
            seen.entered = entering.detach().clone()
        elif entering is not None and self.section.signal == "added":
            left = carried(output, entering)
            seen.added = None if left is None else float(relative_l1(left, entering))
        self._seen.setdefault(tick.branch, {})[name] = seen

    def _before_layer(
        self, known: _Layer, layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        entering = hidden_of(positional, keywords)
        if self._tick is None or entering is None:
            return
        work = entering.numel() * known.channels
        running = self._running
        if known.block is None or running is None or running.block != known.block:
            self._tally.fixed[known.bits] += work
            return
        assert isinstance(layer, FrozenLinear)
        if not running.has_run:
            running.has_run = True
            self._count_block(running)
        layer.input_format = self._format(running, entering)
        bits = input_bits(layer)
        self._tally.work[known.block, self._tick.step, bits] += work

    def _count_block(self, running: Running) -> None:
        assert self._tick is not None
        self._tally.block_calls += 1
        seen = self._seen.get(self._tick.branch, {}).get(running.block)
        is_stale = seen is not None and seen.step != self._tick.step - 1
        if is_stale and self.section.signal != "none":
            self._tally.pinned += not self.section.protects(self._tick.step)

    def _format(self, running: Running, entering: torch.Tensor) -> str:
        """The format of what enters a layer now."""
        largest = self.section.outlier_ratio
        cache = None if largest is None else cache_of(self._module)
        moment = None if cache is None else cache.moment
        if moment is not None and moment.is_writing and largest is not None:
            magnitude = entering.abs()
            if float(magnitude.max()) > largest * float(magnitude.mean()):
                return FLOAT
        return STORED if running.four_bits else self.section.fine


def apply_dynamic(
    module: nn.Module, section: DynamicSection, *, timestep: str | None = None
) -> DynamicPrecision:
    """Let the NVFP4 layers of `module` take their inputs as `section` says, until `remove`.

        handle = apply_dynamic(pipe.transformer, section)
        video = pipe(prompt="a cat", num_inference_steps=50)
        print(handle.report())

    Args:
        module: a planned denoiser, changed in place. A cache may be applied before or after.
        section: what was decided.
        timestep: name of the denoiser's argument, if it is an unusual one.

    Raises:
        InputError: it is applied already, blocks or timestep are not found, a block has no NVFP4
            layer, or one that a kernel executes.
    """
    return DynamicPrecision(module, section, timestep)


def dynamic_precision_of(module: nn.Module) -> DynamicPrecision | None:
    """The dynamic precision that is applied to `module`, if there is one."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, DynamicPrecision)), None)


def _never(*_: Any) -> None:
    raise AssertionError
