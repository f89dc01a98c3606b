"""Trace a module with `torch.export`, with a free batch size where the module allows one.

Other axes (frames, height, width) are left free where that is asked for, and it is an error where
the module does not allow it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vcompress.models.calls import Batch, Call
from vcompress.spec.errors import BuildError

__all__ = ["FreeAxes", "Trace", "quiet", "trace"]

# Name of an input -> number of an axis -> what its size is called.
FreeAxes = Mapping[str, Mapping[int, str]]
_NONE: FreeAxes = MappingProxyType({})

# A traced size of 1 or 0 would be taken for a constant.
_SMALLEST_FREE_BATCH = 2
_REASON_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced module.

    Attributes:
        program: one input (a tensor, or a dictionary of them), one output, no in-place operators.
        static_reason: why the batch size is fixed to that of the example; None if it is free.
    """

    program: torch.export.ExportedProgram
    static_reason: str | None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch and onnxscript print, warn and log off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` in evaluation mode for a while."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def trace(
    module: nn.Module, example: Batch, *, dynamic_batch: bool, free_axes: FreeAxes = _NONE
) -> Trace:
    """Trace `module(example)`, whose first axis is the batch.

    Of a call the module is given `Call.flat`; what it shares has no batch axis.

    Args:
        module: what is traced.
        example: an input.
        dynamic_batch: leave the batch size free if possible.
        free_axes: others that must be free; the input is called "" if it is a tensor.

    Raises:
        BuildError: the module cannot be traced, does not allow an axis to be free, or does not
            return one tensor.
    """
    program, reason = None, "a fixed batch size was asked for"
    with _evaluating(module), torch.no_grad():
        if dynamic_batch:
            program, reason = _with_free_batch(module, example, free_axes)
        if program is None:
            program = _with_fixed_batch(module, example, free_axes)
    num_outputs = len(program.graph_signature.user_outputs)
    if num_outputs != 1:
        message = (
            f"{type(module).__name__} must return one tensor to be exported, got {num_outputs}; "
            "wrap it in a module that picks one"
        )
        raise BuildError(message)
    return Trace(program=program, static_reason=reason or None)


def _argument(example: Batch) -> torch.Tensor | dict[str, torch.Tensor]:
    return example.flat if isinstance(example, Call) else example


def _shown(example: Batch) -> str:
    return str(example.spec) if isinstance(example, Call) else f"shape {list(example.shape)}"


def _with_fixed_batch(
    module: nn.Module, example: Batch, free_axes: FreeAxes
) -> torch.export.ExportedProgram:
    shapes = (_free(example, None, free_axes),) if free_axes else None
    try:
        return torch.export.export(module, (_argument(example),), dynamic_shapes=shapes)
    # torch.export lets through whatever the module raises, and has a dozen errors of its own.
    except Exception as error:
        if free_axes:
            names = sorted({name for axes in free_axes.values() for name in axes.values()})
            message = (
                f"{type(module).__name__} does not allow free {', '.join(names)}: "
                f"{_reason(error)}; leave out what its forward fixes, or export it static"
            )
            raise BuildError(message) from error
        message = (
            f"torch.export cannot trace {type(module).__name__} at {_shown(example)}: "
            f"{_reason(error)}; check the shape, and that its forward has no Python control flow "
            "that depends on data"
        )
        raise BuildError(message) from error


def _free(example: Batch, batch: Any, free_axes: FreeAxes) -> Any:
    """What `torch.export` is told of free axes; `batch` is the dimension of the first, if any."""

    def of(name: str, has_batch: bool) -> dict[int, Any] | None:
        axes = dict.fromkeys(free_axes.get(name, {}), torch.export.Dim.DYNAMIC)
        if batch is not None and has_batch:
            axes = {0: batch, **axes}
        return axes or None

    if isinstance(example, Call):
        return {name: of(name, name in example.tensors) for name in example.flat}
    return of("", has_batch=True)


def _with_free_batch(
    module: nn.Module, example: Batch, free_axes: FreeAxes
) -> tuple[torch.export.ExportedProgram | None, str]:
    """The program and an empty reason, or None and why the batch size cannot be free."""
    if len(example) < _SMALLEST_FREE_BATCH:
        example = (
            example.repeated(_SMALLEST_FREE_BATCH)
            if isinstance(example, Call)
            else torch.cat([example] * _SMALLEST_FREE_BATCH)
        )
    shapes = _free(example, torch.export.Dim("batch"), free_axes)
    try:
        program = torch.export.export(module, (_argument(example),), dynamic_shapes=(shapes,))
    except Exception as error:
        return None, f"torch.export: {_reason(error)}"
    # The first input is one with a batch axis.
    batch = next(
        node.meta["val"].shape[0]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    for output in _outputs(program):
        value = output.meta["val"]
        if value.ndim == 0 or str(value.shape[0]) != str(batch):
            return None, "the first axis of the output does not follow the batch size"
    return program, ""


def _outputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    names = program.graph_signature.user_outputs
    return [node for node in program.graph.nodes if node.name in names]


def _reason(error: Exception) -> str:
    """The first sentence of what `torch.export` says, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Its own errors open with a summary; the first item of the list below it says what is wrong.
    items = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    text = next(iter([*items, *lines]), type(error).__name__).split(". ")[0]
    return text if len(text) <= _REASON_CHARACTERS else text[:_REASON_CHARACTERS] + " ..."
