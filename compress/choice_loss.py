"""Measure whole choices of formats on calibration clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vcompress.calib.calls import Samples
from vcompress.compress.block_error import replaced_all
from vcompress.compress.brute_force import reference_outputs
from vcompress.compress.clip_choice import BATCH_SIZE, ChosenClips, choose_clips
from vcompress.compress.effects import Candidates
from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT

__all__ = ["Comparison", "comparison_of", "measure_choice", "outputs_of_choice"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Clips on which whole choices are measured.

    Attributes:
        clips: with their weights.
        references: outputs of the model, by batch.
        loss: that is measured.
    """

    clips: ChosenClips
    references: list[torch.Tensor]
    loss: TaskLoss

    @property
    def batches(self) -> list[Batch]:
        """Of clips or calls."""
        return self.clips.batches

    def loss_of(self, outputs: Sequence[torch.Tensor]) -> float:
        """Mean loss of `outputs`, by batch."""
        values = [
            self.loss.values(reference, output) * weights
            for reference, output, weights in zip(
                self.references, outputs, self.clips.weights, strict=True
            )
        ]
        return float(torch.cat(values).double().mean())


def comparison_of(
    model: VideoModel, clips: Samples, num_clips: int, *, outputs: torch.Tensor | None = None,
    seed: int = 0,
) -> Comparison:  # fmt: skip
    """`num_clips` of `clips`; where clips are drawn, not those of a prediction with this seed."""
    loss = loss_of(model.task)
    chosen = choose_clips(clips, num_clips, loss, outputs, seed + 1)
    if outputs is None:
        references = reference_outputs(model, chosen.batches)
    else:
        references = list(torch.split(outputs[chosen.indices], BATCH_SIZE))
    return Comparison(clips=chosen, references=references, loss=loss)


def outputs_of_choice(
    model: VideoModel, candidates: Candidates, formats: Mapping[str, str],
    batches: Sequence[Batch],
) -> list[torch.Tensor]:  # fmt: skip
    """The output for each batch with all layers of `formats` in their format at once."""
    frozen = {name: candidates[name][each] for name, each in formats.items() if each != FLOAT}
    with replaced_all(model.module, frozen):
        return reference_outputs(model, batches)


def measure_choice(
    model: VideoModel, candidates: Candidates, formats: Mapping[str, str], comparison: Comparison
) -> float:
    """Mean loss with all layers of `formats` in their format at once."""
    return comparison.loss_of(outputs_of_choice(model, candidates, formats, comparison.batches))
