"""Small networks of which everything can be measured, and clips for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.calib.clips import Clips
from vcompress.calib.observe import observe
from vcompress.compress.context import PlanContext
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.video import Task, VideoModel
from vcompress.pipeline.run import Silent
from vcompress.spec.budget import Budget
from vcompress.spec.target import find_target

Wrap = Callable[..., VideoModel]
MakeClips = Callable[..., Clips]
MakeContext = Callable[..., PlanContext]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.out(
            functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        )
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class Transformer(nn.Module):
    """Clips `[B, 3, 4, 8, 8]` to the logits of ten classes."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(3, width, (2, 4, 4), stride=(2, 4, 4))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        for index, module in enumerate(self.modules()):
            if isinstance(module, nn.Linear):
                # Layers of different weight in the result, with outliers as trained ones have.
                module.weight.data *= 1.0 + index % 4
                module.weight.data[:, index % 16] *= 4.0

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.patches(clips).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="session")
def wrap() -> Wrap:
    def wrapped(module: nn.Module, task: Task = "generic") -> VideoModel:
        load = LoadOptions(input_spec="NCTHW:float32:1x3x4x8x8", task=task)
        return wrap_module(module, name="small", options=load)

    return wrapped


@pytest.fixture(scope="session")
def transformer(wrap: Wrap) -> VideoModel:
    return wrap(Transformer(), "classify")


@pytest.fixture(scope="session")
def make_clips() -> MakeClips:
    def make(model: VideoModel, count: int, seed: int = 0) -> Clips:
        generator = np.random.default_rng(seed)
        shape = (count, *model.clip.input_shape)
        level = generator.normal(size=(count, 3, 1, 1, 1))
        return Clips.from_array((generator.normal(size=shape) + level).astype("f4"), model.clip)

    return make


@pytest.fixture(scope="session")
def make_context() -> MakeContext:
    def make(
        model: VideoModel, clips: Clips, *, target: str = "mixed", algorithm: str = "max",
        budget: Budget | None = None, warnings: list[str] | None = None,
    ) -> PlanContext:  # fmt: skip
        layers = {name: model.layer(name) for name in model.layers}
        return PlanContext(
            target=find_target(target),
            stats=observe(model, layers, clips, needs=frozenset({"input_amax"})),
            original=model, calibration=clips, tokens=None, algorithm=algorithm,
            max_layer_error=10.0, budget=budget, seed=0, stage=Silent().stage,
            warn=([] if warnings is None else warnings).append,
        )  # fmt: skip

    return make
