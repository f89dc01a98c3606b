"""The truth that the predictor is held against: one layer in one format at a time, whole model.

Costs a pass over the clips for every layer and format; `effects` predicts the same numbers for a
few per cent of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from vcompress.compress.block_error import replaced
from vcompress.compress.losses import TaskLoss
from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel

__all__ = ["measure_loss", "measure_losses", "reference_outputs"]


def reference_outputs(model: VideoModel, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The output of `model` for each batch of clips."""
    return [model(batch) for batch in batches]


def measure_loss(
    model: VideoModel, batches: Sequence[Batch], references: Sequence[torch.Tensor],
    loss: TaskLoss,
) -> float:  # fmt: skip
    """Mean loss over all clips of `batches`, against `references`."""
    values = [
        loss.values(reference, model(batch))
        for batch, reference in zip(batches, references, strict=True)
    ]
    return float(torch.cat(values).double().mean())


def measure_losses(
    model: VideoModel, candidates: Mapping[str, Mapping[str, nn.Module]],
    batches: Sequence[Batch], references: Sequence[torch.Tensor], loss: TaskLoss, *,
    on_pair: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean loss with one layer alone in one format, for all `candidates`.

    Args:
        candidates: layer -> format -> the frozen layer.
        on_pair: told the number of pairs that are done.
    """
    losses: dict[str, dict[str, float]] = {}
    for name, formats in candidates.items():
        losses[name] = {}
        for format_name, frozen in formats.items():
            with replaced(model.module, name, frozen):
                losses[name][format_name] = measure_loss(model, batches, references, loss)
            if on_pair is not None:
                on_pair(1)
    return losses
