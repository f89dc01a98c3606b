"""How the reference recognisers are built and trained: shapes, stages and rates, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vcompress.models.reference.fashion_clips import Range

__all__ = ["CONFIGS", "RECIPES", "Recipe", "Stage"]

CONFIGS: dict[str, dict[str, Any]] = {
    "penvideo20": {
        "image_size": 32, "patch_size": 8, "num_channels": 1, "num_frames": 16, "tubelet_size": 2,
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "num_labels": 20,
    },
    "moving_fashion": {
        "image_size": 64, "patch_size": 8, "num_channels": 3, "num_frames": 16, "tubelet_size": 4,
        "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 1024, "num_labels": 80,
    },
}  # fmt: skip
_WARM_UP_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training.

    Attributes:
        steps, batch_size: of the stage.
        keep_tokens: share of a clip's tokens that the model sees.
        prefer_objects: how much rather those of the object: 0 by chance, 1 always first.
        gains: factors between which a clip's background is dimmed, at the stage's first and at its
            last step.
        freedoms: between which its object's path is held (`moving_fashion.compose`), likewise.
    """

    steps: int
    batch_size: int
    keep_tokens: float = 1.0
    prefer_objects: float = 0.0
    gains: tuple[Range, Range] = ((1.0, 1.0), (1.0, 1.0))
    freedoms: tuple[Range, Range] = ((1.0, 1.0), (1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one task is trained.

    Attributes:
        mean, std: of the input, as in the shipped model's clip specification.
        learning_rate: the highest, of AdamW.
        matrix_rate: the highest of Muon, for the matrices of the blocks; None for AdamW there, too.
        decay_from: share of training after which the rate falls, as a cosine.
        stages: in their order.
        factors: sizes of the parts of a class; their product is the number of classes.
    """

    mean: float
    std: float
    learning_rate: float
    matrix_rate: float | None
    decay_from: float
    stages: tuple[Stage, ...]
    factors: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of `step`, and which share of it is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        return self.stages[-1], 1.0

    def rate(self, step: int) -> float:
        """The learning rate of `step`, as a share of the highest."""
        progress = step / self.steps
        falling = max(0.0, (progress - self.decay_from) / (1 - self.decay_from))
        warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
        return warm * (0.5 * (1 + math.cos(math.pi * falling)) + 0.005)


RECIPES: dict[str, Recipe] = {
    # Nearly all pixels are 0: with std 0.1 the pen is not drowned by the position embedding.
    # Dropping tokens would drop the pen tip, so all are kept.
    "penvideo20": Recipe(
        mean=0.0, std=0.1, learning_rate=1e-3, matrix_rate=None, decay_from=0.0, factors=(20,),
        stages=(Stage(steps=1500, batch_size=64),),
    ),
    "moving_fashion": Recipe(
        mean=0.5, std=0.25, learning_rate=1e-3, matrix_rate=0.02, decay_from=0.6, factors=(10, 8),
        stages=(
            Stage(
                steps=1_500, batch_size=96, keep_tokens=0.1, prefer_objects=1,
                gains=((0, 0), (0, 0.5)), freedoms=((0, 0), (0.5, 1)),
            ),
            Stage(
                steps=1_100, batch_size=32, keep_tokens=0.3125, prefer_objects=0.3,
                gains=((0, 0.5), (0.43, 0.81)), freedoms=((0.5, 1), (0.8, 1)),
            ),
            Stage(
                steps=800, batch_size=32, keep_tokens=0.3125, prefer_objects=0.3,
                gains=((0.2, 0.6), (0.4, 0.6)),
            ),
            Stage(steps=700, batch_size=32, gains=((0.4, 0.6), (0.4, 0.6))),
        ),
    ),
}  # fmt: skip
