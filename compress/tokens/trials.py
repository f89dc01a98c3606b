"""Measure token sections on calibration clips, by the loss of the model's task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.compress.tensors import LayerTensors
from vcompress.compress.tokens.fitting import fit_sites, fitted_blocks, objection_to_fit
from vcompress.compress.tokens.readout import (
    Features,
    cross_fitted,
    fit_readout,
    readout_of,
    run_with_features,
)
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.video import VideoModel
from vcompress.spec.token_section import TokenSection

__all__ = ["Measured", "Trials"]

# With fewer clips a refitted readout is not worth a try.
_MIN_CLIPS_TO_REFIT = 64
_PENALTY = 1e-2


@dataclass(frozen=True)
class Measured:
    """What a section costs.

    Attributes:
        loss: mean over the clips, see `compress.losses`; infinite where an output is not finite.
        changed_points: share of the clips whose top class is another one, in points; 0 for models
            that do not classify. Top-1 cannot drop by more on these clips.
    """

    loss: float
    changed_points: float


class Trials:
    """Runs sections on clips and remembers what they cost.

    On all clips, a classifier is judged with its readout refitted where that helps; each clip's
    output then comes from a fit to others.

    Args:
        model: without reduction.
        batches: clips `[B, *input_shape]`; together the search clips, to which techniques that
            need it are fitted too.
        seed: of these fits.
        on_trial: called after each measurement that was not remembered.
    """

    def __init__(
        self, model: VideoModel, batches: Sequence[torch.Tensor],
        on_trial: Callable[[int], None] = lambda _count: None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.batches, self._on_trial, self._seed = model, batches, on_trial, seed
        self.loss: TaskLoss = loss_of(model.task)
        self.num_clips = sum(len(batch) for batch in batches)
        self._references = [model(batch) for batch in batches]
        self._readout = readout_of(model) if self.num_clips >= _MIN_CLIPS_TO_REFIT else None
        self._known: dict[tuple[str, int], Measured] = {}
        self._fitted: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def num_measured(self) -> int:
        """Sections that were run."""
        return len(self._known)

    def measure(self, section: TokenSection, num_batches: int | None = None) -> Measured:
        """Loss of `section` on the first `num_batches` batches; all of them by default."""
        count = len(self.batches) if num_batches is None else min(num_batches, len(self.batches))
        key = (repr(section.as_dict()), count)
        if key not in self._known:
            self._known[key] = self._run(section, count)
            self._on_trial(1)
        return self._known[key]

    def objection(self, section: TokenSection) -> str | None:
        """Why `section` cannot be fitted to these clips, or None."""
        return objection_to_fit(self.model, section, self.num_clips)

    def fitted(self, section: TokenSection) -> dict[str, torch.Tensor]:
        """Tensors of the fitted techniques in `section`, fitted to these clips."""
        if not fitted_blocks(section):
            return {}
        key = repr(section.as_dict())
        if key not in self._fitted:
            self._fitted[key] = fit_sites(self.model, section, self.batches, self._seed)
        return self._fitted[key]

    def refitted(self, section: TokenSection) -> tuple[str, LayerTensors] | None:
        """The readout and its weights for `section`; None where that gains nothing."""
        if self._readout is None:
            return None
        trial = self._reduced(section)
        layer = trial.layer(self._readout)
        assert isinstance(layer, nn.Linear)
        features = run_with_features(trial, self.batches, self._readout)
        tensors = fit_readout(features, torch.cat(self._references), layer, self.loss)
        return None if tensors is None else (self._readout, tensors)

    def _reduced(self, section: TokenSection) -> VideoModel:
        trial = self.model.copy()
        apply_reduction(trial, section, self.fitted(section))
        return trial

    def _run(self, section: TokenSection, num_batches: int) -> Measured:
        trial, references = self._reduced(section), torch.cat(self._references[:num_batches])
        if self._readout is None or num_batches < len(self.batches):
            outputs = [torch.cat([trial(batch) for batch in self.batches[:num_batches]])]
        else:
            features = run_with_features(trial, self.batches, self._readout)
            outputs = [features.outputs, self._cross_fitted(features, references)]
        return min(
            (self._judged(references, output) for output in outputs), key=lambda each: each.loss
        )

    def _cross_fitted(self, features: Features, references: torch.Tensor) -> torch.Tensor:
        assert self._readout is not None
        weight = self.model.layer(self._readout).weight
        assert isinstance(weight, torch.Tensor)
        return cross_fitted(features, references, weight, _PENALTY)

    def _judged(self, references: torch.Tensor, outputs: torch.Tensor) -> Measured:
        losses = self.loss.values(references, outputs)
        points = 0.0
        if self.model.task == "classify":
            changed = outputs.argmax(-1) != references.argmax(-1)
            points = 100 * float(changed.float().mean())
        return Measured(float(losses.nan_to_num(nan=torch.inf).mean()), points)
