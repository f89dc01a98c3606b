"""What each layer costs in each format, predicted from a few clips.

Effects come from `effects`; layers from which no gradient leads to the output are measured instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vcompress.calib.calls import Samples
from vcompress.compress.brute_force import measure_losses, reference_outputs
from vcompress.compress.clip_choice import batches_of, choose_clips
from vcompress.compress.effects import (
    Candidates,
    Effects,
    clips_that_fit,
    predict_effects,
)
from vcompress.compress.frozen import freeze
from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT

__all__ = ["NUM_PROBES", "Sensitivities", "freeze_candidates", "predict_sensitivities"]

# The first probe of KL takes most of its curvature; see `losses`. Of the relative error of an
# image, four probes rank layers no better than two, in 1.5 times the time.
NUM_PROBES = 2


def freeze_candidates(
    model: VideoModel, formats: Sequence[str], input_amax: Mapping[str, float]
) -> dict[str, dict[str, nn.Module]]:
    """Every layer that the clips reached, frozen into each of `formats` that it can take."""
    return {
        name: {
            format_name: freeze(model.layer(name), format_name, input_amax[name], name=name)
            for format_name in formats
            if format_name != FLOAT and facts.objection(format_name) is None
        }
        for name, facts in model.layers.items()
        if name in input_amax
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivities:
    """What each layer costs in each format.

    Attributes:
        loss: in which the costs are.
        effects: predicted, with their correlations.
        measured: layer -> format -> loss, where nothing could be predicted.
        num_clips, num_probes: that the prediction rests on.
    """

    loss: TaskLoss
    effects: Effects
    measured: Mapping[str, Mapping[str, float]]
    num_clips: int
    num_probes: int

    def of(self, layer: str, format_name: str) -> float | None:
        """Loss with `layer` alone in the format; None where it is not known."""
        if format_name == FLOAT:
            return 0.0
        if layer in self.measured:
            return self.measured[layer].get(format_name)
        if format_name not in self.effects.moves.get(layer, {}):
            return None
        return self.effects.loss(layer, format_name)


@torch.no_grad()
def predict_sensitivities(
    model: VideoModel, candidates: Candidates, clips: Samples, *, num_clips: int,
    num_probes: int = NUM_PROBES, outputs: torch.Tensor | None = None, seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> Sensitivities:  # fmt: skip
    """Predict all losses from `num_clips` of `clips`.

    Args:
        outputs: of `model` for all `clips`, if they are known: they tell which clips matter.
    """
    loss = loss_of(model.task)
    chosen = choose_clips(clips, num_clips, loss, outputs, seed)
    size = clips_that_fit(model, candidates, chosen.batches[0])
    effects = predict_effects(
        model, candidates,
        (batch[at : at + size] for batch in chosen.batches for at in range(0, len(batch), size)),
        loss, num_probes=num_probes, seed=seed, on_batch=on_batch,
        weights=[part for weights in chosen.weights for part in torch.split(weights, size)],
    )  # fmt: skip
    blind = {name: candidates[name] for name in effects.unreached}
    measured: dict[str, dict[str, float]] = {}
    if blind:
        batches = batches_of(clips, num_clips)
        measured = measure_losses(model, blind, batches, reference_outputs(model, batches), loss)
    return Sensitivities(
        loss=loss, effects=effects, measured=measured, num_clips=len(chosen),
        num_probes=num_probes,
    )  # fmt: skip
