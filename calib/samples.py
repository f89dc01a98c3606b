"""A sample of what each layer receives, for calibration that needs more than ranges."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.calib.calls import Samples
from vcompress.models.calls import Batch

__all__ = ["sample_inputs"]


def sample_inputs(
    forward: Callable[[Batch], object],
    layers: Mapping[str, nn.Module],
    clips: Samples,
    *,
    num_tokens: int,
    seed: int,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Run all `clips` through `forward` and keep random rows of the inputs of `layers`.

    Args:
        forward: runs the model on a batch.
        layers: linear layers by full name.
        num_tokens: rows to keep of each layer, at most; every batch gives an equal share.
        seed: of the choice of rows.
        on_batch: called after each batch with the number of clips in it.

    Returns:
        `[T, K]` float32 on the CPU by layer, in the order of the clips, no row twice; layers that
        receive the same tensor (the query, key and value of an attention) share one. Layers that
        the clips do not reach are absent.
    """
    sampler = _Sampler(seed, num_tokens)
    num_batches = -(-len(clips) // batch_size)
    with torch.inference_mode(), ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(sampler.hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in clips.tensors(batch_size):
            sampler.begin(-(-num_tokens // num_batches))
            forward(batch)
            if on_batch is not None:
                on_batch(len(batch))
    return sampler.result()


@dataclass(frozen=True, eq=False)
class _Seen:
    """A tensor of which rows were taken, and for which layer."""

    tensor: weakref.ref[torch.Tensor]
    layer: str
    index: torch.Tensor
    picked: torch.Tensor

    def is_of(self, value: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether `value` is this tensor, not a later one at its address, nor changed since."""
        return self.tensor() is value and torch.equal(rows[self.index].float().cpu(), self.picked)


class _Sampler:
    def __init__(self, seed: int, limit: int) -> None:
        self._limit = limit
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._leader: dict[str, str] = {}
        self._share = 0
        self._recent: dict[int, _Seen] = {}

    def begin(self, share: int) -> None:
        """A new batch, of which `share` rows a layer are kept."""
        self._share = share
        self._recent.clear()

    def hook(self, name: str) -> Callable[..., None]:
        def see(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            rows = value.reshape(-1, value.shape[-1])
            if not len(rows):
                return
            recent = self._recent.get(id(value))
            if recent is not None and recent.is_of(value, rows):
                self._leader[name] = recent.layer
                return
            index = self._drawn(len(rows), self._share).to(rows.device)
            picked = rows[index].float().cpu()
            self._recent[id(value)] = _Seen(weakref.ref(value), name, index, picked)
            self._rows.setdefault(name, []).append(picked)

        return see

    def _drawn(self, count: int, wanted: int) -> torch.Tensor:
        """`wanted` of the numbers below `count`, or all of them, in order."""
        return torch.randperm(count, generator=self._generator)[:wanted].sort().values

    def result(self) -> dict[str, torch.Tensor]:
        """All rows, by layer."""
        samples = {}
        for name, parts in self._rows.items():
            rows = torch.cat(parts)
            # A layer that is called for every frame has given a share each time.
            samples[name] = rows[self._drawn(len(rows), self._limit)]
        for name, leader in self._leader.items():
            if name not in samples and leader in samples:
                samples[name] = samples[leader]
        return samples
