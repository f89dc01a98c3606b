"""How much one layer's precision matters: measured, one layer at a time.

The block that encloses a layer is run on real inputs twice, once as it is and once with this layer
alone in the format; the score is the relative L2 error of the block's output. A layer outside all
blocks (patch embedding, head) is judged by its own output. Only the block runs, so the cost is
(layers per block) x (one pass through the blocks), not (layers) x (the model).

This is the observation that 6Bit-Diffusion (2026) builds on, block outputs rather than weights,
without its predictor: every score here is a measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.compress.frozen import freeze
from vcompress.models.video import VideoModel, primary_output

__all__ = ["measure_layer", "measure_sensitivity", "recorded_inputs", "replaced"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextmanager
def replaced(root: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    """Put `replacement` in the place of the submodule `name` for a while."""
    parent = root.get_submodule(name.rpartition(".")[0])
    child = name.rpartition(".")[2]
    original = root.get_submodule(name)
    setattr(parent, child, replacement)
    try:
        yield
    finally:
        setattr(parent, child, original)


def recorded_inputs(model: VideoModel, names: set[str], clips: torch.Tensor) -> dict[str, Call]:
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


@torch.inference_mode()
def measure_layer(
    model: VideoModel, name: str, format_name: str, input_amax: float, call: Call,
    reference: torch.Tensor, smoothing: torch.Tensor | None = None,
) -> float:  # fmt: skip
    """Relative L2 error of the enclosing module's output with `name` alone in `format_name`.

    Args:
        call: recorded call of the enclosing block, or of the layer itself if there is none.
        reference: output of that call before quantization.
        smoothing: the layer's input factors, if an algorithm calibrated some.
    """
    frozen = freeze(
        model.layer(name), format_name, input_amax, input_smoothing=smoothing, name=name
    )
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
def measure_sensitivity(
    model: VideoModel, candidates: Mapping[str, str], input_amax: Mapping[str, float],
    clips: torch.Tensor, smoothing: Mapping[str, torch.Tensor],
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scores of all `candidates` (layer -> format), by layer.

    Layers that the clips did not reach get no score.
    """
    scopes = {name: model.block_of(name) or name for name in candidates}
    calls = recorded_inputs(model, set(scopes.values()), clips)
    references = {
        scope: primary_output(model.layer(scope)(*call.arguments, **call.keywords))
        for scope, call in calls.items()
    }
    scores: dict[str, float] = {}
    for done, (name, format_name) in enumerate(candidates.items(), start=1):
        scope = scopes[name]
        if scope in calls and name in input_amax:
            scores[name] = measure_layer(
                model, name, format_name, input_amax[name], calls[scope], references[scope],
                smoothing.get(name),
            )  # fmt: skip
        if on_layer is not None:
            on_layer(done)
    return scores
