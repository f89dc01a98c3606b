"""What identifies the output of every module of a run, without keeping it.

Shapes: P parts of a window, alike in frames; an axis of an output is cut into P as well.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from vcompress.models.video import primary_output

__all__ = ["Run", "Seen", "ratio_axis", "watched"]

_NUM_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The output of a module that ran once.

    Attributes:
        axis: along which its parts stand, or None if it has none.
        digests: of the bytes of each part.
        samples: values of each part, `[P, n]`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    digests: tuple[int, ...]
    samples: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind, in the order in which the modules ended.

    Attributes:
        result: the primary output; None if the run ended with `error`.
    """

    outputs: Mapping[str, Seen]
    result: torch.Tensor | None
    error: str


class AxisOf(Protocol):
    """Along which axis an output is looked at in parts."""

    def __call__(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The axis for the module `name`, or None."""
        ...


def ratio_axis(whole: tuple[int, ...], part: tuple[int, ...], ratio: int) -> int | None:
    """The only axis along which the shapes differ, if `whole` is `ratio` times `part` there."""
    if len(whole) != len(part):
        return None
    differing = [axis for axis in range(len(whole)) if whole[axis] != part[axis]]
    fits = len(differing) == 1 and whole[differing[0]] == ratio * part[differing[0]]
    return differing[0] if fits else None


def watched(module: nn.Module, clip: torch.Tensor, axis_of: AxisOf, num_parts: int) -> Run:
    """Run `module` on `clip`; modules that run more than once are left out."""
    outputs: dict[str, Seen] = {}
    often: set[str] = set()

    def watch(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if name in outputs or name in often:
            outputs.pop(name, None)
            often.add(name)
        elif isinstance(output, torch.Tensor):
            outputs[name] = _seen(output, axis_of(name, tuple(output.shape)), num_parts)

    result, error = None, ""
    with _hooks(module, watch), torch.inference_mode():
        try:
            result = primary_output(module(clip))
        except Exception as failure:
            # A chunk may end where the model expects a window, and every model says so in its way.
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Run(outputs=outputs, result=result, error=error)


@contextmanager
def _hooks(module: nn.Module, watch: Any) -> Iterator[None]:
    handles = [
        part.register_forward_hook(partial(watch, name))
        for name, part in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(output: torch.Tensor, axis: int | None, num_parts: int) -> Seen:
    digests: tuple[int, ...] = ()
    samples = torch.empty(0)
    if axis is not None and output.numel():
        parts = output.movedim(axis, 0).contiguous().flatten().view(num_parts, -1)
        places = torch.linspace(0, parts.shape[1] - 1, _NUM_SAMPLES).long()
        samples = parts[:, places].double()
        digests = tuple(zlib.crc32(part.view(torch.uint8).numpy()) for part in parts)
    return Seen(
        shape=tuple(output.shape), dtype=output.dtype, axis=axis, digests=digests, samples=samples
    )
