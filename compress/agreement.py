"""How well predicted sensitivities agree with measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vcompress.compress.allocate import Choice, Group, allocate

__all__ = ["Agreement", "compare_sensitivities"]

Losses = Mapping[str, Mapping[str, float]]

_TOP_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Predicted against measured losses.

    Attributes:
        spearman: rank correlation over all pairs of layer and format. 1 where all predicted and
            all measured losses are equal, 0 where only those of one kind are; what is not finite
            counts as the largest.
        spearman_by_format: the same within one format.
        top_overlap: share of the truly most sensitive fifth of the pairs that is among the
            predicted most sensitive fifth.
        regret: measured loss of the plan from predictions over that of the plan from
            measurements, less one; both as sums over layers, at `regret_bits` effective bits.
        num_pairs: that were compared.
    """

    spearman: float
    spearman_by_format: Mapping[str, float]
    top_overlap: float
    regret: float
    regret_bits: float
    num_pairs: int


def compare_sensitivities(
    predicted: Losses, measured: Losses, groups: Sequence[Group], num_weights: int, bits: float
) -> Agreement:
    """Compare losses by layer and format; see `Agreement`.

    Args:
        predicted, measured: layer -> format -> loss, over the same pairs.
        groups: options with their predicted loss and their cost in bits.
        num_weights: of all groups.
        bits: effective bits at which the regret is taken.
    """
    pairs = [(layer, name) for layer, formats in predicted.items() for name in formats]
    ours = [predicted[layer][name] for layer, name in pairs]
    truth = [measured[layer][name] for layer, name in pairs]
    by_format = {
        name: _spearman(
            [predicted[layer][name] for layer, other in pairs if other == name],
            [measured[layer][name] for layer, other in pairs if other == name],
        )
        for name in dict.fromkeys(name for _, name in pairs)
    }
    top = max(1, round(_TOP_SHARE * len(pairs)))
    return Agreement(
        spearman=_spearman(ours, truth),
        spearman_by_format=by_format,
        top_overlap=len(_largest(ours, top) & _largest(truth, top)) / top,
        regret=_regret(measured, groups, num_weights * bits),
        regret_bits=bits,
        num_pairs=len(pairs),
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    ours, truth = _finite(first), _finite(second)
    if len(set(ours)) < 2 or len(set(truth)) < 2:
        return float(len(set(ours)) < 2 and len(set(truth)) < 2)
    return float(spearmanr(ours, truth).statistic)


def _finite(losses: Sequence[float]) -> list[float]:
    """`losses`, with NaN and infinity above all others."""
    worst = 2 * max((loss for loss in losses if math.isfinite(loss)), default=0.0) + 1.0
    return [loss if math.isfinite(loss) else worst for loss in losses]


def _largest(values: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=_finite(values).__getitem__, reverse=True)[:count])


def _regret(measured: Losses, groups: Sequence[Group], bits: float) -> float:
    everything = [loss for formats in measured.values() for loss in formats.values()]
    worst = max(_finite(everything), default=0.0)
    true_groups = [
        Group(
            group.layers,
            tuple(
                replace(
                    option,
                    loss=sum(
                        loss if math.isfinite(loss) else worst
                        for layer, name in option.formats.items()
                        for loss in (measured.get(layer, {}).get(name, 0.0),)
                    ),
                )
                for option in group.options
            ),
        )
        for group in groups
    ]
    what = "the bits of the weights"
    chosen = _true_loss(true_groups, allocate(groups, bits, what=what))
    best = _true_loss(true_groups, allocate(true_groups, bits, what=what))
    return chosen / best - 1 if best > 0 else 0.0


def _true_loss(groups: Sequence[Group], choice: Choice) -> float:
    return sum(group.options[index].loss for group, index in zip(groups, choice, strict=True))
