"""Predict what every layer costs in every format, from a few gradients.

What: quantizing one layer changes its output by d. To second order the loss (see `losses`) then
grows by E[(g . d)^2], where g is the gradient of a probe with respect to this output. One forward
pass, one backward pass a probe, and d for each format, which is the quantized layer run on the
input that is there anyway, give the loss of all layers in all formats; brute force would run the
whole model once for each pair.

Source: the second-order view of OBD (LeCun et al., 1989) with the Fisher information as curvature,
as in modelopt's `auto_quantize` and FIT (Zandonati et al., 2022, arXiv:2210.08502).
What we changed: they take the gradient's squares and the error's squares apart, summed element by
element, as if the errors of all tokens and channels were independent. They are not: rounding a
weight moves every token alike. Here the inner product over a clip is taken first and squared
afterwards, which is exact in all correlations within a layer. For the same reason the *sum* of the
effects of several layers, squared, predicts their joint loss, interactions included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vcompress.compress.clip_layout import Layout, by_clip, inner_products, layout_of
from vcompress.compress.losses import TaskLoss
from vcompress.models.calls import Batch, run_module
from vcompress.models.video import VideoModel, primary_output

__all__ = ["Candidates", "Effects", "clips_that_fit", "predict_effects"]

# Activations that a batch may hold, and how often each is held: as the input and the output of a
# layer, for what autograd saves, and as gradients of the probes.
_HELD_BYTES = 4 * 2**30
_TIMES_HELD = 4

# Layer -> format -> the frozen layer.
Candidates = Mapping[str, Mapping[str, nn.Module]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """How far each layer in each format moves each probe.

    Attributes:
        moves: layer -> format -> float64 `[num_samples]`, a sample being a probe of a clip.
        unreached: layers that the clips reach, but no gradient of the output does, or none that is
            not zero (rounding, comparisons): nothing can be predicted there.
    """

    moves: Mapping[str, Mapping[str, torch.Tensor]]
    unreached: tuple[str, ...]

    def loss(self, layer: str, format_name: str) -> float:
        """Predicted loss with `layer` alone in `format_name`."""
        return float(self.moves[layer][format_name].square().mean())

    def joint_loss(self, formats: Mapping[str, str]) -> float:
        """Predicted loss with every layer of `formats` in its format; others stay as they are.

        Layers of which nothing could be predicted are passed over.
        """
        moves = [self.moves.get(layer, {}).get(name) for layer, name in formats.items()]
        present = [move for move in moves if move is not None]
        return float(torch.stack(present).sum(0).square().mean()) if present else 0.0


@dataclass
class _Calls:
    """What one forward pass left behind, by layer: every call's input and output."""

    names: list[str] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


def predict_effects(
    model: VideoModel, candidates: Candidates, batches: Iterator[Batch], loss: TaskLoss, *,
    num_probes: int, seed: int = 0, weights: Sequence[torch.Tensor] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Effects:  # fmt: skip
    """Run `batches` of clips through `model` and feel out all `candidates`.

    Args:
        candidates: layer -> format -> the frozen layer.
        batches: of clips or calls, at least one batch.
        num_probes: backward passes a batch. More clips serve better than more probes; more probes
            are cheaper where there are many formats.
        seed: of the probes.
        weights: of the clips of each batch, `[b]`; 1 for each by default. The loss that is
            predicted is the mean of weight times loss.
        on_batch: told the number of clips that are done.
    """
    generator = torch.Generator().manual_seed(seed)
    moves: dict[str, dict[str, list[torch.Tensor]]] = {
        layer: {name: [] for name in formats} for layer, formats in candidates.items()
    }
    seen: set[str] = set()
    reached: set[str] = set()
    layouts: list[Layout | None] | None = None
    for number, clips in enumerate(batches):
        scale = None if weights is None else weights[number].sqrt()
        calls, gradients = _feel(model, candidates, clips, loss, num_probes, scale, generator)
        if layouts is None or len(layouts) != len(calls.names):
            layouts = _layouts(model, candidates, clips, calls)
        seen.update(calls.names)
        sums: dict[tuple[str, str], torch.Tensor] = {}
        with torch.inference_mode():
            for index, name in enumerate(calls.names):
                by_probe = [gradient[index] for gradient in gradients]
                if not any(each is not None and bool(each.any()) for each in by_probe):
                    continue
                reached.add(name)
                output, layout = calls.outputs[index], layouts[index]
                rows = torch.stack(
                    [
                        by_clip(torch.zeros_like(output) if each is None else each,
                                 len(clips), layout)
                        for each in by_probe
                    ],
                    dim=1,
                )  # fmt: skip
                for format_name, frozen in candidates[name].items():
                    change = by_clip(frozen(calls.inputs[index]) - output, len(clips), layout)
                    step = inner_products(rows, change, len(clips))
                    key = name, format_name
                    sums[key] = sums[key] + step if key in sums else step
        for layer, formats in moves.items():
            for format_name, samples in formats.items():
                nothing = torch.zeros(num_probes, len(clips), dtype=torch.float64)
                samples.append(sums.get((layer, format_name), nothing).flatten())
        if on_batch is not None:
            on_batch(len(clips))
    return Effects(
        moves={
            layer: {name: torch.cat(samples) for name, samples in formats.items()}
            for layer, formats in moves.items()
            if layer in reached
        },
        unreached=tuple(name for name in candidates if name in seen and name not in reached),
    )


@torch.inference_mode()
def clips_that_fit(model: VideoModel, candidates: Candidates, clips: Batch) -> int:
    """How many clips like the first of `clips` a batch may have, by what their layers see.

    At least 1. The bound is the same on every machine, and so is what comes out.
    """
    sizes: list[int] = []

    def record(
        _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any],
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        value = (*arguments, *keywords.values())[0]
        sizes.extend(each.numel() * each.element_size() for each in (value, output))

    with ExitStack() as hooks:
        for name in candidates:
            handle = model.layer(name).register_forward_hook(record, with_kwargs=True)
            hooks.callback(handle.remove)
        device = next(model.module.parameters()).device
        run_module(model.module, clips[:1].to(device))
    return max(1, _HELD_BYTES // max(1, _TIMES_HELD * sum(sizes)))


def _feel(
    model: VideoModel, candidates: Candidates, clips: Batch, loss: TaskLoss,
    num_probes: int, scale: torch.Tensor | None, generator: torch.Generator,
) -> tuple[_Calls, list[tuple[torch.Tensor | None, ...]]]:  # fmt: skip
    """What the layers saw of `clips`, and the gradients of each probe for their outputs.

    The probes of each clip are multiplied by its `scale`.
    """

    def attempt() -> tuple[_Calls, list[tuple[torch.Tensor | None, ...]]]:
        calls, output = _run(model, candidates, clips)
        probes = loss.probes(output.detach(), num_probes, generator)
        if scale is not None:
            by_clip = scale.to(output.device).view(-1, *[1] * (output.ndim - 1))
            probes = [probe * by_clip for probe in probes]
        return calls, [_gradients(output, probe, calls.outputs) for probe in probes]

    try:
        return attempt()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
    # The model works in place on what autograd has saved (`x += shortcut` after a ReLU). Asked for
    # only then: it slows every operation down.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        return attempt()


def _run(model: VideoModel, candidates: Candidates, clips: Batch) -> tuple[_Calls, torch.Tensor]:
    """Forward with gradients for the activations alone."""
    calls = _Calls()
    with torch.enable_grad(), _frozen_parameters(model.module), ExitStack() as hooks:
        for name in candidates:
            handle = model.layer(name).register_forward_hook(
                _recorder(name, calls), with_kwargs=True
            )
            hooks.callback(handle.remove)
        device = next(model.module.parameters()).device
        return calls, primary_output(run_module(model.module, clips.to(device)))


@torch.inference_mode()
def _layouts(
    model: VideoModel, candidates: Candidates, clips: Batch, calls: _Calls
) -> list[Layout | None]:
    """Where the clips are in the output of each of `calls`, by running the first clip alone."""
    names: list[str] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for name in candidates:

            def record(
                _layer: nn.Module, _inputs: Any, output: torch.Tensor, at: str = name
            ) -> None:
                names.append(at)
                outputs.append(output.clone())

            hooks.callback(model.layer(name).register_forward_hook(record).remove)
        device = next(model.module.parameters()).device
        run_module(model.module, clips[:1].to(device))
    if names != calls.names:
        return [None] * len(calls.names)
    return [layout_of(*pair, len(clips)) for pair in zip(calls.outputs, outputs, strict=True)]


def _recorder(name: str, calls: _Calls) -> Callable[..., torch.Tensor]:
    def record(
        _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if not output.requires_grad:
            # A zero that wants a gradient: the graph starts here, and no weight is in it.
            output = output + torch.zeros((), device=output.device, requires_grad=True)
        calls.names.append(name)
        # What follows may work in place on both.
        calls.inputs.append((*arguments, *keywords.values())[0].detach().clone())
        calls.outputs.append(output)
        return output.clone()

    return record


@contextmanager
def _frozen_parameters(module: nn.Module) -> Iterator[None]:
    """No gradients for weights: they are not needed and cost as much as those of activations."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _gradients(
    output: torch.Tensor, probe: torch.Tensor, inner: list[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    # A part of the model may run without gradients.
    wanting = [tensor for tensor in inner if tensor.requires_grad]
    if not output.requires_grad or not wanting:
        return (None,) * len(inner)
    found = iter(
        torch.autograd.grad(
            output, wanting, probe.to(output.dtype), retain_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if tensor.requires_grad else None for tensor in inner)
