"""Samples of layers' inputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.calib.samples import sample_inputs
from vcompress.spec.clip import ClipSpec

SPEC = ClipSpec(num_frames=2, height=4, width=4, channels=1, layout="NCTHW", dtype="float32")


def numbered(count: int) -> Clips:
    """Every value of every clip is another number."""
    data = np.arange(count * 32, dtype=np.float32).reshape(count, 1, 2, 4, 4)
    return Clips.from_array(data, SPEC)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.frame, self.after = (nn.Linear(4, 4) for _ in range(4))
        self.pooled, self.unreached = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.flatten(1, 3).clone()  # B, 8, 4
        y = self.q(x) + self.k(input=x)
        for frame in x.unbind(1):
            self.frame(frame)
        x += 1000.0
        self.after(x)
        self.pooled(x[:0])
        return self.pooled(y.mean(1))


def sampled(count: int, num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Net()
    layers = {name: layer for name, layer in net.named_children()}
    return sample_inputs(
        net, layers, numbered(count), num_tokens=num_tokens, seed=seed, batch_size=8
    )


def test_layers_with_the_same_input_share_a_sample() -> None:
    found = sampled(20, 50)
    assert found["k"] is found["q"]
    assert "unreached" not in found
    # The tensor of `q`, changed in place since: not a sample that could be shared.
    assert float(found["after"].min()) >= 1000
    assert float(found["q"].max()) < 20 * 32


def test_rows_are_real_in_order_and_none_is_there_twice() -> None:
    for num_tokens, expected in ((50, 50), (10_000, 160)):
        rows = sampled(20, num_tokens)["q"]
        # Numbered clips: the first value of a row is 4 times its number.
        numbers = rows[:, 0] / 4
        assert rows.shape == (expected, 4)
        assert rows.dtype == torch.float32
        assert torch.equal(numbers, numbers.round())
        assert bool((numbers[1:] > numbers[:-1]).all())
        # All batches give their share.
        assert {int(number) // 64 for number in numbers} == {0, 1, 2}


def test_no_layer_gives_more_than_was_asked_for() -> None:
    found = sampled(20, 48)
    # `frame` is called eight times a batch.
    assert {name: len(rows) for name, rows in found.items()} == {
        "q": 48, "k": 48, "frame": 48, "after": 48, "pooled": 20,
    }  # fmt: skip


def test_the_seed_decides() -> None:
    first, again, other = sampled(20, 30), sampled(20, 30), sampled(20, 30, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["q"], other["q"])
