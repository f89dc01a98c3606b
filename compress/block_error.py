"""How much one layer's precision matters to its block: measured, one layer at a time.

The block that encloses a layer is run on real inputs twice, once as it is and once with this layer
alone in its format; the score is the relative L2 error of the block's output. A layer outside all
blocks (patch embedding, head) is judged by its own output. Only the block runs, so the cost is
(layers per block) x (one pass through the blocks), not (layers) x (the model).

This is the observation that 6Bit-Diffusion (2026) builds on, block outputs rather than weights,
without its predictor: every score here is a measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel, primary_output

__all__ = [
    "block_error", "measure_block_errors", "recorded_inputs", "replaced", "replaced_all",
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextmanager
def replaced(root: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    """Put `replacement` in the place of the submodule `name` for a while.

    A submodule that is used in several places has several names; it is replaced in all of them.
    """
    original = root.get_submodule(name)
    places = [
        (root.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2])
        for place, module in root.named_modules(remove_duplicate=False)
        if module is original
    ]
    for parent, child in places:
        setattr(parent, child, replacement)
    try:
        yield
    finally:
        for parent, child in places:
            setattr(parent, child, original)


@contextmanager
def replaced_all(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """`replaced`, for several submodules at once."""
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(replaced(root, name, replacement))
        yield


def recorded_inputs(model: VideoModel, names: set[str], clips: Batch) -> dict[str, Call]:
    """The first call of each module in `names` while the model processes `clips`."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(
            _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> None:
            if name not in calls:
                # A block may work in place on what it was given.
                calls[name] = copy.deepcopy(Call(arguments, keywords))

        return record

    handles = [
        model.layer(name).register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name in names
    ]
    try:
        model(clips)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def block_error(
    model: VideoModel, name: str, frozen: nn.Module, call: Call, reference: torch.Tensor
) -> float:
    """Relative L2 error of the enclosing module's output with `frozen` in the place of `name`.

    Args:
        call: recorded call of the enclosing block, or of the layer itself if there is none.
        reference: output of that call before quantization.
    """
    scope = model.block_of(name)
    if scope is None:
        output = primary_output(frozen(*call.arguments, **call.keywords))
    else:
        with replaced(model.module, name, frozen):
            output = primary_output(model.layer(scope)(*call.arguments, **call.keywords))
    error = torch.linalg.vector_norm(output.float() - reference.float())
    size = torch.linalg.vector_norm(reference.float())
    return float(error / size) if size > 0 else float(error)


@torch.inference_mode()
def measure_block_errors(
    model: VideoModel, frozen: Mapping[str, nn.Module], clips: Batch,
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The error that each of the `frozen` layers causes alone, by layer.

    Layers that the clips did not reach have none.
    """
    scopes = {name: model.block_of(name) or name for name in frozen}
    calls = recorded_inputs(model, set(scopes.values()), clips)
    references = {
        scope: primary_output(model.layer(scope)(*call.arguments, **call.keywords))
        for scope, call in calls.items()
    }
    errors: dict[str, float] = {}
    for name, layer in frozen.items():
        scope = scopes[name]
        if scope in calls:
            errors[name] = block_error(model, name, layer, calls[scope], references[scope])
        if on_layer is not None:
            on_layer(1)
    return errors
