"""The lines that predict a block's error, fitted to what was measured on whole runs.

A run is made with fine inputs everywhere. Each time a block has run it runs once more on inputs of
four bits; the error is the relative L2 difference of the two outputs. Signals are those of the
step before, so the first step of a run gives no point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vcompress.compress.cache.policies.base import relative_l1
from vcompress.compress.cache.stack import find_stack
from vcompress.compress.dynamic.executor import DynamicPrecision, Running
from vcompress.compress.dynamic.layers import carried, hidden_of
from vcompress.compress.dynamic.lines import Line, fit_line
from vcompress.compress.frozen import FrozenLayer, FrozenLinear
from vcompress.spec.dynamic_section import STORED, DynamicSection, ErrorLine, Signal
from vcompress.spec.errors import InputError

__all__ = ["Point", "blocks_that_change", "fit", "held_weights", "measure_blocks", "section_of"]

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Point:
    """One block in one step of one branch of one run.

    Attributes:
        run: counts generations from 1.
        branch: guidance branch.
        block: full name.
        step: from 0.
        added, moved: the signals, see `executor`; None in the first step.
        error: of inputs of four bits against fine ones, relative to the block's output.
    """

    run: int
    branch: str
    block: str
    step: int
    added: float | None
    moved: float | None
    error: float

    def signal(self, name: Signal) -> float | None:
        """The signal called `name`."""
        return {"added": self.added, "moved": self.moved, "none": 0.0}[name]


class _Observer(DynamicPrecision):
    """Runs everything with fine inputs, and every block once more with inputs of four bits."""

    def __init__(self, module: nn.Module, section: DynamicSection) -> None:
        super().__init__(module, section, None)
        self.points: list[Point] = []
        self._added: dict[tuple[str, str], tuple[int, float]] = {}

    @torch.no_grad()
    def _after_block(
        self, name: str, block: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any],
        output: Any,
    ) -> None:  # fmt: skip
        tick, entering = self._tick, hidden_of(positional, keywords)
        if tick is None or entering is None:
            return
        moved = self._signal(name, entering)
        step, added = self._added.get((tick.branch, name), (-2, 0.0))
        left = carried(output, entering)
        self._running = Running(name, entering, four_bits=True)
        rounded = carried(block.forward(*positional, **keywords), entering)
        if left is not None and rounded is not None:
            error = (rounded - left).norm() / left.norm().clamp_min(_TINY)
            self.points.append(Point(
                run=self._tally.num_generations, branch=tick.branch, block=name, step=tick.step,
                added=added if step == tick.step - 1 else None, moved=moved, error=float(error),
            ))  # fmt: skip
            self._added[tick.branch, name] = (tick.step, float(relative_l1(left, entering)))
        super()._after_block(name, block, positional, keywords, output)


@contextmanager
def measure_blocks(
    module: nn.Module, *, num_steps: int, fine: str, blocks: Sequence[str] = ()
) -> Iterator[list[Point]]:
    """Measure every run of the planned denoiser `module` inside.

    Args:
        num_steps: of a run.
        fine: the format of inputs that four bits are compared with.
        blocks: by default those that have layers which can change.
    """
    names = tuple(blocks) or blocks_that_change(module)
    lines = {name: ErrorLine(alpha=0.0, beta=1.0) for name in names}
    # "moved" keeps what entered each block; the threshold lets none take four bits.
    section = DynamicSection(
        signal="moved", threshold=0.0, num_steps=num_steps, blocks=lines, fine=fine,
        outlier_ratio=None,
    )  # fmt: skip
    with _Observer(module, section) as observer:
        yield observer.points


def blocks_that_change(module: nn.Module) -> tuple[str, ...]:
    """Blocks of the main stack that have layers in NVFP4.

    Raises:
        InputError: there are none.
    """
    found = []
    for name in find_stack(module):
        layers = module.get_submodule(name).modules()
        if any(isinstance(each, FrozenLinear) and each.format == STORED for each in layers):
            found.append(name)
    if not found:
        message = (
            f"dynamic precision changes the inputs of layers in {STORED}, of which "
            f"{type(module).__name__} has none in its blocks; take --target nvfp4 or mixed"
        )
        raise InputError(message)
    return tuple(found)


def fit(points: Sequence[Point], signal: Signal) -> Mapping[str, Line]:
    """The line of every block over all runs, in the order of the blocks.

    With "none", and where a signal was never known, it is the mean error, without a correlation.
    """
    lines = {}
    for block in dict.fromkeys(point.block for point in points):
        own = [point for point in points if point.block == block]
        pairs = [(point.signal(signal), point.error) for point in own]
        known = np.array([pair for pair in pairs if pair[0] is not None], dtype=np.float64)
        if signal == "none" or not len(known):
            mean = float(np.mean([point.error for point in own]))
            lines[block] = Line(
                alpha=0.0, beta=mean, correlation=float("nan"), num_points=len(known)
            )
        else:
            lines[block] = fit_line(known[:, 0], known[:, 1])
    return lines


def section_of(
    points: Sequence[Point], signal: Signal, share: float, *, num_steps: int, fine: str,
    protect: tuple[int, int] = (0, 0),
) -> DynamicSection:  # fmt: skip
    """The section whose lines are fitted to `points`, and which gives four bits to `share` of them.

    Blocks count alike, however much work they are. Where fewer are free the share is what is left.
    """
    lines = {
        name: ErrorLine(alpha=line.alpha, beta=line.beta)
        for name, line in fit(points, signal).items()
    }
    first, last = protect
    predicted = []
    for point in points:
        value = point.signal(signal)
        if value is not None and first <= point.step < num_steps - last:
            predicted.append(lines[point.block].alpha * value + lines[point.block].beta)
    ranked = np.sort(predicted)
    count = min(round(share * len(points)), len(ranked))
    threshold = float(ranked[count - 1]) if count else float(min(ranked, default=0.0)) - 1.0
    return DynamicSection(
        signal=signal, threshold=threshold, num_steps=num_steps, blocks=lines, fine=fine,
        protect_first=first, protect_last=last,
    )  # fmt: skip


@contextmanager
def held_weights(module: nn.Module) -> Iterator[None]:
    """Keep the unpacked weights of `module`, so that a search of many runs unpacks them once."""
    held = []
    for layer in module.modules():
        if isinstance(layer, FrozenLayer) and "dequantized_weight" not in layer.__dict__:
            weight = layer.dequantized_weight()
            layer.__dict__["dequantized_weight"] = _constant(weight)
            held.append(layer)
    try:
        yield
    finally:
        for layer in held:
            del layer.__dict__["dequantized_weight"]


def _constant(weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: weight
