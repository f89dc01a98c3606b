"""Find the mixed-precision plan with the least loss under a budget.

Effects of all layers in all formats are predicted (`sensitivities`), and the formats are chosen
exactly for the losses as if they added up (`allocate`). Then the loss of the whole choice is
measured on calibration clips. Where it is not what the layers add up to, there is a second round:
the choice is corrected for predicted interactions (`refine`), and of the two the one with the
smaller measured loss is taken.

Why not always a second round, or a search by measured losses: on a trained classifier the sum
ranks plans better than both do. Rounding an input that was rounded before is a new rounding, so
that predicted interactions hold only in part; and measured losses of plans that are about as good
differ by less than their noise over the clips (docs/precision.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vcompress.compress.allocate import Choice, Group, Option, allocate, refine
from vcompress.compress.choice_loss import Comparison, measure_choice
from vcompress.compress.effects import Candidates
from vcompress.compress.sensitivities import Sensitivities
from vcompress.models.structure import find_shared_inputs
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT, FORMATS

__all__ = ["Found", "PrecisionSearch"]

# A choice may lose so many times more or less than the sum of its layers; a few clips do not tell
# it more exactly.
_ADDS_UP = 3.0
# Correlations between layers are estimated from a few dozen samples; half of what is seen is
# believed, so that the search does not feed on their noise.
_BELIEF = 0.5
_NUM_MULTIPLIERS = 97


class PrecisionSearch:
    """Options of every group of layers, for one model, and the choice under a budget."""

    def __init__(
        self, model: VideoModel, candidates: Candidates, sensitivities: Sensitivities,
        extra_bits: Callable[[str, str], int] | None = None, *, share_inputs: bool = True,
        cost_of: Callable[[Mapping[str, str]], float | None] | None = None,
    ) -> None:  # fmt: skip
        """Collect the options.

        Args:
            share_inputs: layers that receive the same tensor get the same format, as a runtime
                that fuses them needs it.
            extra_bits: of what calibration may add to a layer (first) in a format (second).
            cost_of: what layers in their formats cost, None where they cannot have them; bits by
                default.
        """
        self._cost_of = cost_of or self.bits
        self._model = model
        self._candidates = candidates
        self._sensitivities = sensitivities
        self._extra_bits = extra_bits or (lambda _name, _format: 0)
        shared = (
            find_shared_inputs(model.module, list(candidates), model.example(1))
            if share_inputs
            else [(name,) for name in candidates]
        )
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
                cost = self._cost_of(formats)
                if cost is not None:
                    options.append(Option(formats=formats, loss=self._loss(formats), cost=cost))
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

    def trade_off(self) -> list[tuple[float, float]]:
        """What fewer bits cost: (cost, predicted loss) from the cheapest choice to the dearest.

        Choices on the lower hull of all, by the multiplier that weighs cost against loss
        (Everett, 1963); losses as if they added up.
        """
        costs = [np.array([option.cost for option in group.options]) for group in self.groups]
        losses = [np.array([option.loss for option in group.options]) for group in self.groups]
        found = set()
        for multiplier in (0.0, *np.logspace(-12, 12, _NUM_MULTIPLIERS), math.inf):
            picked = [
                # Of equals the cheaper one.
                int(np.lexsort((cost, loss + multiplier * cost / self.num_weights))[0])
                if math.isfinite(multiplier)
                else int(np.lexsort((loss, cost))[0])
                for cost, loss in zip(costs, losses, strict=True)
            ]
            found.add((
                float(sum(cost[index] for cost, index in zip(costs, picked, strict=True))),
                float(sum(loss[index] for loss, index in zip(losses, picked, strict=True))),
            ))  # fmt: skip
        return sorted(found)

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

    def choose(self, bits: float, comparison: Comparison) -> Found:
        """The best formats with weights of at most `bits` bits.

        Args:
            bits: all groups together.
            comparison: calibration clips on which choices are measured.
        """
        exact = allocate(self.groups, bits, what="the bits of the weights")
        found = self._found(exact, comparison)
        if found.adds_up:
            return found
        refined = refine(self.groups, exact, bits, self._interaction())
        if refined == exact:
            return found
        # A comparison with NaN is never true.
        return min(
            found, self._found(refined, comparison),
            key=lambda one: math.inf if math.isnan(one.measured_loss) else one.measured_loss,
        )  # fmt: skip

    def _found(self, choice: Choice, comparison: Comparison) -> Found:
        formats = self._formats(choice)
        chosen = zip(self.groups, choice, strict=True)
        return Found(
            formats=formats,
            bits=self.bits(formats),
            summed_loss=sum(group.options[index].loss for group, index in chosen),
            joint_loss=self._sensitivities.effects.joint_loss(formats),
            measured_loss=measure_choice(self._model, self._candidates, formats, comparison),
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

    @property
    def adds_up(self) -> bool:
        """Whether the measured loss is about the sum of those of its layers."""
        low, high = self.summed_loss / _ADDS_UP, self.summed_loss * _ADDS_UP
        return low <= self.measured_loss <= high
