"""Find the mixed-precision plan with the least loss under a budget.

Effects of all layers in all formats are predicted (`effects`), the formats are chosen exactly for
the losses as if they added up (`allocate`), the choice is corrected for interactions (`refine`),
and of the two the one with the smaller *measured* loss on calibration clips is taken. Layers from
which no gradient leads to the output are measured instead of predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.compress.allocate import Choice, Group, Option, allocate, refine
from vcompress.compress.block_error import replaced_all
from vcompress.compress.brute_force import measure_losses, reference_outputs
from vcompress.compress.effects import Effects, predict_effects
from vcompress.compress.frozen import freeze
from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.models.structure import find_shared_inputs
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT, FORMATS

__all__ = [
    "Candidates", "Found", "PrecisionSearch", "Sensitivities", "batches_of", "freeze_candidates",
    "measure_choice", "outputs_of_choice", "predict_sensitivities",
]  # fmt: skip

Candidates = Mapping[str, Mapping[str, nn.Module]]

_BATCH_SIZE = 8
# Correlations between layers are estimated from a few hundred samples; half of what is seen is
# believed, so that the search does not feed on their noise.
_BELIEF = 0.5


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


def batches_of(clips: Clips, num_clips: int) -> list[torch.Tensor]:
    """`num_clips` of the clips, or all where there are fewer, in batches for the model."""
    num_clips = min(num_clips, len(clips))
    # Clips of a folder stand in the order of their classes.
    spread = clips.subset([index * len(clips) // num_clips for index in range(num_clips)])
    return [torch.from_numpy(batch) for batch in spread.batches(_BATCH_SIZE)]


@torch.no_grad()
def predict_sensitivities(
    model: VideoModel, candidates: Candidates, clips: Clips, *, num_clips: int, num_probes: int,
    seed: int, on_batch: Callable[[int], None] | None = None,
) -> Sensitivities:  # fmt: skip
    """Predict all losses from `num_clips` of `clips`."""
    loss = loss_of(model.task)
    batches = batches_of(clips, num_clips)
    effects = predict_effects(
        model, candidates, iter(batches), loss, num_probes=num_probes, seed=seed,
        on_batch=on_batch,
    )  # fmt: skip
    blind = {name: candidates[name] for name in effects.unreached}
    measured = measure_losses(model, blind, batches, reference_outputs(model, batches), loss)
    return Sensitivities(
        loss=loss, effects=effects, measured=measured,
        num_clips=sum(len(batch) for batch in batches), num_probes=num_probes,
    )  # fmt: skip


def outputs_of_choice(
    model: VideoModel, candidates: Candidates, formats: Mapping[str, str],
    batches: Sequence[torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """The output for each batch with all layers of `formats` in their format at once."""
    frozen = {name: candidates[name][each] for name, each in formats.items() if each != FLOAT}
    with replaced_all(model.module, frozen):
        return reference_outputs(model, batches)


def measure_choice(
    model: VideoModel, candidates: Candidates, formats: Mapping[str, str],
    batches: Sequence[torch.Tensor], references: Sequence[torch.Tensor], loss: TaskLoss,
) -> float:  # fmt: skip
    """Mean loss with all layers of `formats` in their format at once."""
    outputs = outputs_of_choice(model, candidates, formats, batches)
    values = [loss.values(*pair) for pair in zip(references, outputs, strict=True)]
    return float(torch.cat(values).double().mean())


class PrecisionSearch:
    """Options of every group of layers, for one model, and the choice under a budget."""

    def __init__(
        self, model: VideoModel, candidates: Candidates, sensitivities: Sensitivities,
        extra_bits: Callable[[str, str], int] | None = None,
    ) -> None:  # fmt: skip
        """Collect the options.

        Args:
            extra_bits: of what calibration may add to a layer (first) in a format (second).
        """
        self._model = model
        self._candidates = candidates
        self._sensitivities = sensitivities
        self._extra_bits = extra_bits or (lambda _name, _format: 0)
        shared = find_shared_inputs(model.module, list(candidates), model.example(1))
        self.groups = tuple(self._group(layers) for layers in shared)
        missing = set(candidates).difference(*(group.layers for group in self.groups))
        assert not missing, f"calibrated, but not run on the example: {missing}"

    def _group(self, layers: tuple[str, ...]) -> Group:
        common = set.intersection(*(set(self._candidates[name]) for name in layers))
        options = []
        for format_name in (*sorted(common), FLOAT):
            losses = [self._sensitivities.of(name, format_name) for name in layers]
            if all(loss is not None and math.isfinite(loss) for loss in losses):
                formats = dict.fromkeys(layers, format_name)
                options.append(
                    Option(formats=formats, loss=self._loss(formats), cost=self.bits(formats))
                )
        return Group(layers, tuple(options))

    def _loss(self, formats: Mapping[str, str]) -> float:
        predicted = {n: f for n, f in formats.items() if n in self._sensitivities.effects.moves}
        rest = [self._sensitivities.of(n, f) or 0.0 for n, f in formats.items()
                if n not in predicted]  # fmt: skip
        return self._sensitivities.effects.joint_loss(predicted) + sum(rest)

    def bits(self, formats: Mapping[str, str]) -> float:
        """Bits that the weights of the layers of `formats` take, scales and extras counted."""
        return sum(
            FORMATS[format_name].weight_bits(self._model.layers[name].weight_shape)
            + self._extra_bits(name, format_name)
            if format_name != FLOAT
            else 8 * weight.numel() * weight.element_size()
            for name, format_name in formats.items()
            for weight in (self._model.layer(name).weight,)
            if isinstance(weight, torch.Tensor)
        )

    @property
    def num_weights(self) -> int:
        """Weights of all layers that are decided."""
        return sum(
            math.prod(self._model.layers[name].weight_shape)
            for group in self.groups
            for name in group.layers
        )

    @property
    def fewest_bits(self) -> float:
        """Bits of all groups, each with its smallest option; no budget can be below it."""
        return sum(min(option.cost for option in group.options) for group in self.groups)

    def _interaction(self) -> npt.NDArray[np.float64]:
        moves = []
        empty = torch.zeros(self._sensitivities.num_clips * self._sensitivities.num_probes,
                            dtype=torch.float64)  # fmt: skip
        for option in self._options():
            parts = [
                self._sensitivities.effects.moves.get(name, {}).get(format_name, empty)
                for name, format_name in option.formats.items()
            ]
            moves.append(torch.stack(parts).sum(0))
        if not moves:
            return np.zeros((0, 0))
        rows = torch.stack(moves).numpy()
        interaction: npt.NDArray[np.float64] = _BELIEF * (rows @ rows.T) / rows.shape[1]
        np.fill_diagonal(interaction, [option.loss for option in self._options()])
        return interaction

    def _options(self) -> Iterable[Option]:
        return (option for group in self.groups for option in group.options)

    def choose(self, bits: float, batches: Sequence[torch.Tensor]) -> Found:
        """The best formats with weights of at most `bits` bits.

        Args:
            bits: all groups together.
            batches: calibration clips on which the two solutions are compared.
        """
        exact = allocate(self.groups, bits, what="the bits of the weights")
        refined = refine(self.groups, exact, bits, self._interaction())
        references = reference_outputs(self._model, batches)
        found = []
        for choice in dict.fromkeys((exact, refined)):
            formats = self._formats(choice)
            measured = measure_choice(
                self._model, self._candidates, formats, batches, references,
                self._sensitivities.loss,
            )  # fmt: skip
            summed = sum(
                group.options[index].loss for group, index in zip(self.groups, choice, strict=True)
            )
            found.append(
                Found(
                    formats=formats, bits=self.bits(formats), summed_loss=summed,
                    joint_loss=self._sensitivities.effects.joint_loss(formats),
                    measured_loss=measured,
                )
            )  # fmt: skip
        # A comparison with NaN is never true.
        return min(
            found,
            key=lambda one: math.inf if math.isnan(one.measured_loss) else one.measured_loss,
        )

    def _formats(self, choice: Choice) -> dict[str, str]:
        return {
            name: format_name
            for group, index in zip(self.groups, choice, strict=True)
            for name, format_name in group.options[index].formats.items()
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice of formats and what it costs.

    Attributes:
        formats: layer -> format.
        bits: of the weights of these layers.
        summed_loss: predicted, as if losses added up.
        joint_loss: predicted with the correlations between layers.
        measured_loss: of all layers together, on calibration clips.
    """

    formats: Mapping[str, str]
    bits: float
    summed_loss: float
    joint_loss: float
    measured_loss: float
