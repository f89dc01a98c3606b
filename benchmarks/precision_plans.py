"""Mixed-precision plans of any origin, applied by vcompress and judged on the same held-out clips.

A plan is a format for each layer, with plain rounding. Bits are counted twice: modelopt counts 16
for a weight that is kept and no channel or tensor scales, vcompress all bits that are stored, 32
for a kept float32 weight.

`shipped` is what `vcompress quantize --target mixed` makes of a bound: formats are searched and the
layers calibrated by `auto`, whose factors and biases count within the bound.

The ratio of two mean losses on the same clips has an interval of 95 % from a paired bootstrap: a
few clips at the border of two classes make up most of a mean of KL.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.benchmarks.peers.modelopt_setup import BITS
from vcompress.benchmarks.precision_judge import Judge, finite
from vcompress.benchmarks.zoo import BenchModel
from vcompress.calib.stats import Stats
from vcompress.compress.context import PlanContext
from vcompress.compress.frozen import FrozenLayer
from vcompress.compress.precision import plan_precision
from vcompress.compress.precision_search import PrecisionSearch
from vcompress.compress.quantize import apply_choices
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Silent
from vcompress.spec.budget import Budget
from vcompress.spec.defaults import MAX_LAYER_ERROR
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import LayerChoice
from vcompress.spec.target import find_target

__all__ = ["Judged", "Plans", "bits_in_peer_count"]

_RESAMPLES = 2000


def bits_in_peer_count(model: VideoModel, formats: Mapping[str, str]) -> float:
    """Effective bits as modelopt counts them, over all layers; those without a format are kept."""
    sizes = {name: math.prod(facts.weight_shape) for name, facts in model.layers.items()}
    bits = sum(size * BITS[formats.get(name, FLOAT)] for name, size in sizes.items())
    return bits / sum(sizes.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """A plan on the test clips.

    Attributes:
        facts: loss, SQNR, task metric, effective bits in both counts and layers by format.
        losses: of each clip, float64 `[N]`.
    """

    facts: Mapping[str, Any]
    losses: npt.NDArray[np.float64]

    def over(self, other: Judged) -> dict[str, float | None]:
        """Mean loss over that of `other`, and the interval in which this ratio is known."""
        draws = np.random.default_rng(0).integers(
            0, len(self.losses), (_RESAMPLES, len(self.losses))
        )
        means = self.losses[draws].mean(1) / np.maximum(other.losses[draws].mean(1), 1e-30)
        low, high = np.quantile(means, (0.025, 0.975))
        ratio = float(self.losses.mean() / max(other.losses.mean(), 1e-30))
        return {"ratio": finite(ratio), "low": finite(float(low)), "high": finite(float(high))}


@dataclass(frozen=True, kw_only=True, eq=False)
class Plans:
    """Judges plans, each only once.

    Attributes:
        stats: ranges of the inputs, which every plan gets.
        search: counts our bits.
        formats: that plans may use.
        seed: of `shipped`.
    """

    bench: BenchModel
    judge: Judge
    stats: Stats
    search: PrecisionSearch
    formats: tuple[str, ...]
    seed: int = 0
    _known: dict[tuple[str, ...], Judged] = field(default_factory=dict)

    def judged(self, formats: Mapping[str, str]) -> Judged:
        """The plan with these formats; layers without one, or that no clip reached, are kept."""
        model = self.bench.model
        choices = {
            name: LayerChoice(
                format=formats.get(name, FLOAT) if name in self.stats.input_amax else FLOAT,
                reason="found by the search", input_amax=self.stats.input_amax.get(name),
            )
            for name in model.layers
        }  # fmt: skip
        used = {name: choice.format for name, choice in choices.items()}
        key = tuple(used.values())
        if key not in self._known:
            planned = model.copy()
            apply_choices(planned, choices, {})
            facts, losses = self.judge.judge_clips(planned)
            facts |= {
                "effective_bits_peer_count": finite(bits_in_peer_count(model, used)),
                "effective_bits_our_count": finite(self.bits(used)),
                "num_layers": dict(Counter(used.values())),
            }
            self._known[key] = Judged(facts=facts, losses=losses.numpy())
        return self._known[key]

    def shipped(self, effective_bits: float) -> Judged | None:
        """The product's whole plan under a bound in our count, calibration included.

        None where the bound has no room for what calibration may add.
        """
        model = self.bench.model
        context = PlanContext(
            target=replace(find_target("mixed"), formats=(*self.formats, FLOAT)),
            stats=self.stats, original=model, calibration=self.bench.calibration, tokens=None,
            algorithm="auto", max_layer_error=MAX_LAYER_ERROR,
            budget=Budget("effective_bits", effective_bits), seed=self.seed,
            stage=Silent().stage, warn=lambda _: None,
        )  # fmt: skip
        start = time.process_time()
        try:
            made = plan_precision(model, context)
        except InputError:
            return None
        seconds = time.process_time() - start
        planned = model.copy()
        apply_choices(planned, made.choices, made.tensors)
        facts, losses = self.judge.judge_clips(planned)
        layers = [(planned.layer(name), facts) for name, facts in model.layers.items()]
        bits = sum(
            layer.weight_bits + layer.extra_bits
            if isinstance(layer, FrozenLayer)
            else 32 * math.prod(shape.weight_shape)
            for layer, shape in layers
        )
        num_weights = sum(math.prod(shape.weight_shape) for _, shape in layers)
        formats = Counter(choice.format for choice in made.choices.values())
        facts |= {
            "effective_bits_our_count": finite(bits / num_weights),
            "num_layers": dict(formats),
            "seconds_with_calibration": round(seconds, 3),
        }
        return Judged(facts=facts, losses=losses.numpy())

    def bits(self, formats: Mapping[str, str]) -> float:
        """Effective bits in our count, over the layers that the clips reached."""
        layers = [name for group in self.search.groups for name in group.layers]
        return self.search.bits({name: formats[name] for name in layers}) / self.search.num_weights
