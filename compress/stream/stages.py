"""A model in two stages: what sees frames for themselves, and what sees all of a window.

The second stage is the model itself, run on nothing: the module at the cut returns features that
are handed to it, and the modules before the cut return zeros that nobody reads. The first stage is
the model again, left as soon as the module at the cut has its output. So no family needs code of
its own, and a compressed model is cut like the one that it was made from.

Shapes: T frames of a window, t of a chunk, R rows of features of a window. Rows stand first,
wherever the module at the cut puts them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from vcompress.models.video import primary_output

__all__ = ["Seam", "Stages", "stages_at"]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Two callables: all that a stream needs of a model, whatever runtime is behind them.

    Attributes:
        window: T, frames of a window.
        chunk: t, frames that `encode` takes. Always as many: what a matrix product returns for a
            row may depend, in the last bits, on how many rows there are.
        rows: R, of a window.
        encode: clips `[1, ...]` of t frames in the model's layout -> features `[R t / T, ...]`.
        answer: features `[R, ...]`, the oldest first -> the primary output for one window.
    """

    window: int
    chunk: int
    rows: int
    encode: Callable[[torch.Tensor], torch.Tensor]
    answer: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Where a module is cut.

    Attributes:
        module: full name of the last module that sees frames for themselves.
        shape: of its output for a window.
        axis: of `shape` along which frames stand, one behind the other.
        before: names of the modules whose outputs are not needed behind it, and their shapes and
            types; none inside another.
        dtype: of its output.
    """

    module: str
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    before: Sequence[tuple[str, tuple[int, ...], torch.dtype]]


class _ReachedError(Exception):
    """Leaves a model at the cut."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__("the output of the first stage is there")
        self.output = output


class _Leave:
    """A forward hook: what comes behind the module is not run."""

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        raise _ReachedError(output)


class _Given:
    """In the place of a module's forward: returns `value`, whatever comes in."""

    def __init__(self, value: torch.Tensor | None = None) -> None:
        self.value = value

    def __call__(self, *_inputs: Any, **_named: Any) -> torch.Tensor:
        assert self.value is not None
        return self.value


def stages_at(
    module: nn.Module, seam: Seam, example: torch.Tensor, *, window: int, chunk: int
) -> Stages:
    """`module` cut at `seam`. It is left as it is; its tensors are shared, not copied.

    Args:
        example: one window, for its shape and type.
    """
    first, second = _sharing_copy(module), _sharing_copy(module)
    first.get_submodule(seam.module).register_forward_hook(_Leave())
    features = _Given()
    _replace_forward(second.get_submodule(seam.module), features)
    zeros: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}
    for name, shape, dtype in seam.before:
        nothing = zeros.setdefault((shape, dtype), torch.zeros(shape, dtype=dtype))
        _replace_forward(second.get_submodule(name), _Given(nothing))
    no_clip = torch.zeros_like(example)

    def encode(clip: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            try:
                first(clip)
            except _ReachedError as reached:
                return reached.output.movedim(seam.axis, 0)
        message = "the module at the cut did not run"
        raise AssertionError(message)

    def answer(rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features.value = rows.movedim(0, seam.axis).contiguous()
            return primary_output(second(no_clip))

    return Stages(
        window=window, chunk=chunk, rows=seam.shape[seam.axis], encode=encode, answer=answer
    )  # fmt: skip


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A copy whose structure may be changed, over the same parameters and buffers."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _replace_forward(module: nn.Module, forward: _Given) -> None:
    # Hooks have seen the value already; attributes that others read stay where they are.
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    module.__dict__["forward"] = forward
