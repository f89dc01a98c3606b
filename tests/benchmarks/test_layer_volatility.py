"""Volatility and the line that is fitted to it, on numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vcompress.benchmarks.layer_volatility import Measured, fit_lines, measure


class Doubling(nn.Module):
    """One block that doubles its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16, bias=False)])
        self.blocks[0].weight.data = 2 * torch.eye(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def test_a_block_that_doubles_has_volatility_one() -> None:
    model = Doubling()
    holder = nn.Sequential(model)
    with torch.no_grad(), measure(holder, ["0"], every_nth_call=2) as found:
        for _ in range(4):
            holder(torch.ones(3, 16))
    assert found.volatility == {"0": [pytest.approx(1.0)] * 2}
    # 1 and 2 are numbers of NVFP4.
    assert found.error == {"0.blocks.0": [pytest.approx(0.0, abs=1e-6)] * 2}
    assert not holder._forward_pre_hooks


def test_the_line_is_fitted_to_the_step_before() -> None:
    volatility = [0.1, 0.4, 0.2, 0.3, 0.9]
    error = [7.0, *(2 * value + 0.5 for value in volatility[:-1])]
    (line,) = fit_lines([Measured({"b": volatility}, {"b.l": error}, {"b.l": "b"})]).values()
    assert (line.alpha, line.beta) == (pytest.approx(2.0), pytest.approx(0.5))
    assert line.correlation == pytest.approx(1.0)
    assert line.num_points == 4
