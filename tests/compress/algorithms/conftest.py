"""One linear layer as trained transformers have them: correlated inputs with outlier channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vcompress.compress.algorithms.problem import LayerProblem

MakeProblem = Callable[..., LayerProblem]


@pytest.fixture
def make_problem() -> MakeProblem:
    def make(
        format: str = "nvfp4", *, num_tokens: int = 1500, num_channels: int = 128,
        num_outputs: int = 48, outlier: float = 20.0, bias: bool = True, mean: float = 0.5,
    ) -> LayerProblem:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        # A few directions carry most of the variance, so that columns can make up for each other.
        directions = torch.randn(num_channels, num_channels, generator=generator)
        strengths = torch.logspace(0, -1.5, num_channels).unsqueeze(1)
        inputs = torch.randn(num_tokens, num_channels, generator=generator)
        inputs = inputs @ (strengths * directions) / num_channels**0.5 + mean
        inputs[:, 5::37] *= outlier
        weight = torch.randn(num_outputs, num_channels, generator=generator) / num_channels**0.5
        weight[:, 5::37] /= max(outlier, 1.0) ** 0.5
        return LayerProblem(
            weight=weight, bias=torch.randn(num_outputs, generator=generator) if bias else None,
            inputs=inputs, input_amax=float(inputs.abs().amax()) if num_tokens else 1.0,
            format=format,
        )  # fmt: skip

    return make
