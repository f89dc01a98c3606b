"""What is measured of blocks, the lines through it, and the share that gets four bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vcompress.compress.dynamic.calibrate import (
    Point,
    fit,
    held_weights,
    measure_blocks,
    section_of,
)
from vcompress.compress.frozen import FrozenLinear, freeze


def point(step: int, added: float | None, error: float, block: str = "b") -> Point:
    return Point(run=1, branch="call 1", block=block, step=step, added=added, moved=added,
                 error=error)  # fmt: skip


POINTS = [
    point(0, None, 9.0),
    *(point(step, value, 2 * value + 0.5) for step, value in enumerate((0.4, 0.1, 0.2, 0.3), 1)),
]


def test_the_line_goes_through_the_points_that_have_a_signal() -> None:
    line = fit(POINTS, "added")["b"]
    assert (line.alpha, line.beta, line.correlation) == pytest.approx((2, 0.5, 1))
    assert line.num_points == 4
    mean = fit(POINTS, "none")["b"]
    assert (mean.alpha, mean.beta) == (0, pytest.approx((9 + 4 * 0.5 + 2 * 1.0) / 5))


def test_a_run_of_one_step_has_no_signal_and_a_level_line() -> None:
    alone = [point(0, None, 0.25), point(0, None, 0.75)]
    for signal in ("added", "moved"):
        line = fit(alone, signal)["b"]
        assert (line.alpha, line.beta, line.num_points) == (0, 0.5, 0)
        assert line.correlation != line.correlation
    section = section_of(alone, "added", 0.5, num_steps=1, fine="int8_token")
    assert not section.takes_four_bits("b", 0, None)


@pytest.mark.parametrize(("share", "calm"), [(0.0, []), (0.4, [2, 3]), (0.8, [1, 2, 3, 4])])
def test_the_calmest_take_four_bits(share: float, calm: list[int]) -> None:
    section = section_of(POINTS, "added", share, num_steps=5, fine="int8_token")
    taken = [each.step for each in POINTS if section.takes_four_bits("b", each.step, each.added)]
    assert taken == calm


def test_protected_steps_are_not_among_the_share() -> None:
    section = section_of(POINTS, "added", 0.4, num_steps=5, fine="int8_token", protect=(3, 0))
    taken = [each.step for each in POINTS if section.takes_four_bits("b", each.step, each.added)]
    assert taken == [3, 4]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        plain = nn.Linear(16, 16, bias=False)
        plain.weight.data = torch.eye(16)
        self.layer: nn.Module = freeze(plain, "nvfp4", 6.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layer(hidden_states)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: torch.Tensor, timestep: float) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
def test_blocks_are_measured_against_fine_inputs() -> None:
    model = Denoiser().eval()
    latent = torch.linspace(-1, 1, 32).reshape(1, 2, 16)
    with measure_blocks(model, num_steps=8, fine="keep") as points:
        for step in range(2):
            model((1 + step / 4) * latent, 8.0 - step)
    first = model.blocks[0].layer
    assert isinstance(first, FrozenLinear)
    assert [(each.block, each.step) for each in points] == [
        ("blocks.0", 0), ("blocks.1", 0), ("blocks.0", 1), ("blocks.1", 1),
    ]  # fmt: skip
    # Without rounding a block doubles what it is given: it adds as much, and moves as the latent.
    assert [each.added for each in points[:2]] == [None, None]
    assert [each.added for each in points[2:]] == pytest.approx([1, 1])
    assert [each.moved for each in points[2:]] == pytest.approx([0.25, 0.25])
    rounded = first.quantized_input(latent)
    expected = (rounded - latent).norm() / (2 * latent).norm()
    assert points[0].error == pytest.approx(float(expected), rel=1e-4)
    assert first.input_format == "nvfp4"
    assert not model._forward_hooks


@torch.no_grad()
def test_held_weights_are_the_same_and_let_go() -> None:
    model = Denoiser().eval()
    latent = torch.ones(1, 2, 16)
    expected = model(latent, 1.0)
    with held_weights(model):
        assert torch.equal(model(latent, 1.0), expected)
    assert all("dequantized_weight" not in each.__dict__ for each in model.modules())
