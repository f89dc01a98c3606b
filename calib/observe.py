"""Watching layers while clips go through a model: one run for everything that passes need.

Running maxima stay on the device of the model and are looked at once a batch, so that a GPU is
not stopped at every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vcompress.calib.calls import Samples
from vcompress.calib.stats import NEEDS, Stats
from vcompress.models.calls import Batch
from vcompress.spec.errors import InputError

__all__ = ["observe"]

_SPATIAL_AXES: dict[type[nn.Module], int] = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip

# Numbers a clip: more are not worth their memory.
_LARGEST_OUTPUT = 2**14


def observe(
    forward: Callable[[Batch], object],
    layers: Mapping[str, nn.Module],
    clips: Samples,
    *,
    needs: frozenset[str],
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Stats:
    """Run all `clips` through `forward` once and collect the statistics `needs`.

    Args:
        forward: runs the model on a batch of `n` clips or calls on the CPU (it moves the batch
            where the model is).
        layers: the layers to watch, by full name.
        clips: the calibration clips.
        needs: names in `stats.NEEDS`.
        batch_size: clips a batch. The result does not depend on it beyond rounding in the model.
        on_batch: called after each batch with the number of clips in it.

    Raises:
        InputError: a layer received NaN or infinity.
        ValueError: an unknown need.
    """
    unknown = needs - NEEDS
    if unknown:
        message = f"unknown statistics {sorted(unknown)}; known are {sorted(NEEDS)}"
        raise ValueError(message)
    collector = _Collector(needs)
    outputs: list[torch.Tensor | None] = []
    start = 0
    with torch.inference_mode(), _watched(layers, collector.see):
        for batch in clips.tensors(batch_size):
            result = forward(batch)
            if "outputs" in needs:
                outputs.append(_small(result, len(batch)))
            collector.check(start, start + len(batch) - 1)
            start += len(batch)
            if on_batch is not None:
                on_batch(len(batch))
    return Stats(
        num_clips=start,
        calib_sha256=clips.digest,
        calls={name: collector.calls.get(name, 0) for name in layers},
        input_amax=collector.input_amax() if "input_amax" in needs else {},
        input_channel_amax=collector.channel_amax() if "input_channel_amax" in needs else {},
        outputs=_joined(outputs),
    )


def _small(result: object, count: int) -> torch.Tensor | None:
    """`result` on the CPU, if it is a small tensor of `count` rows: class probabilities are."""
    if not isinstance(result, torch.Tensor) or result.shape[:1] != (count,):
        return None
    return result.cpu() if result.numel() <= count * _LARGEST_OUTPUT else None


def _joined(outputs: list[torch.Tensor | None]) -> torch.Tensor | None:
    kept = [output for output in outputs if output is not None]
    return torch.cat(kept) if kept and len(kept) == len(outputs) else None


class _Collector:
    """Running maxima of |x| of each layer: per channel if asked for, else one number."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.calls: dict[str, int] = {}
        self._per_channel = "input_channel_amax" in needs
        self._amax: dict[str, torch.Tensor] = {}
        self._seen_in_batch: dict[str, None] = {}  # in the order of the calls

    def see(self, name: str, layer: nn.Module, value: torch.Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if value.numel() == 0:
            return
        amax = _channel_amax(layer, value) if self._per_channel else _amax(value)
        previous = self._amax.get(name)
        # torch.maximum keeps NaN, so that one check a batch is enough.
        self._amax[name] = amax if previous is None else torch.maximum(previous, amax)
        self._seen_in_batch[name] = None

    def check(self, first_clip: int, last_clip: int) -> None:
        """Raise if a layer saw NaN or infinity in the batch; the first one called is named."""
        for name in self._seen_in_batch:
            if not math.isfinite(self._amax[name].max().item()):
                message = (
                    f"activations must be finite; the input of layer {name} holds NaN or infinity "
                    f"for clips {first_clip} to {last_clip}; check the weights of the layers "
                    "before it and the clip's rescale, mean and std"
                )
                raise InputError(message)
        self._seen_in_batch.clear()

    def input_amax(self) -> dict[str, float]:
        return {name: amax.max().item() for name, amax in self._amax.items()}

    def channel_amax(self) -> dict[str, torch.Tensor]:
        return {name: amax.cpu() for name, amax in self._amax.items()}


def _amax(value: torch.Tensor) -> torch.Tensor:
    low, high = value.aminmax()
    return torch.maximum(-low.float(), high.float())


def _channel_amax(layer: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """`[channels]`: convolutions have the channels before the spatial axes, others last."""
    axis = -1
    for kind, num_axes in _SPATIAL_AXES.items():
        if isinstance(layer, kind):
            axis = -1 - num_axes
    rows = value.movedim(axis, -1)
    low, high = rows.reshape(-1, rows.shape[-1]).aminmax(dim=0)
    return torch.maximum(-low.float(), high.float())


@contextmanager
def _watched(
    layers: Mapping[str, nn.Module], see: Callable[[str, nn.Module, torch.Tensor], None]
) -> Iterator[None]:
    """Call `see(name, layer, first input)` before each call of a layer, within the context."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    see(name, layer, value)
                    return

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(hook_for(name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield
