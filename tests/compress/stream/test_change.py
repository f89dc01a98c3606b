"""Gates by hand: what they see, what they would have repeated, which one is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vcompress.compress.stream.change import (
    SIGNALS,
    Gate,
    Replay,
    Watched,
    find_gate,
    replay,
    thumbnails,
)
from vcompress.compress.stream.windows import Repeating
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError


def watched(levels: list[float], labels: list[int]) -> Watched:
    """Windows of one frame of one brightness each."""
    cells = torch.tensor(levels).view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 16, 16)
    return Watched(thumbnails=cells, labels=labels)


def test_signals_by_hand() -> None:
    change = torch.zeros(4, 2, 16, 16)
    change[0, :, 3, 5] = 0.5
    change[1, :, 3, 5] = -0.5
    # 4 of 4 x 2 x 256 values are 0.5; the cell has 1/2 in 2 of 4 frames; a frame has 2 of 512;
    # over the frames the two cancel.
    expected = {"mean": 2 / 2048, "cell": 0.25, "frame": 1 / 512, "scene": 0.0}
    assert {name: float(signal(change)) for name, signal in SIGNALS.items()} == pytest.approx(
        expected
    )


def test_thumbnails_average() -> None:
    frames = torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    frames[0, :2, :3, 1] = 255  # one cell of 2 x 3 pixels, in green
    cells = thumbnails(frames)
    assert cells.shape == (1, 3, 16, 16)
    assert float(cells[0, 1, 0, 0]) == 1
    assert float(cells.sum()) == 1


def test_a_replay_by_hand() -> None:
    video = watched([0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3], [0, 0, 1, 1, 1, 2, 2])
    # Window 1 is 0.1 from 0 and repeated; 2 is 0.2 away and computed; 3 is 0.1 from it, and so on
    # up to three repeats in a row (3, 4, 5; 5 disagrees), then 6 is computed.
    gate = Gate(signal="mean", threshold=0.15, max_repeats=3)
    assert replay([video], gate) == Replay(num_windows=7, num_repeated=4, num_agreed=6)
    assert replay([video, video], gate).agreement == pytest.approx(12 / 14)
    once = Gate(signal="mean", threshold=0.15, max_repeats=1)
    # 1, 3 and 5 are repeated: 0 -> 1, 2 -> 3, 4 -> 5 (disagrees).
    assert replay([video], once) == Replay(num_windows=7, num_repeated=3, num_agreed=6)


def test_the_gate_that_repeats_most_and_agrees_is_found() -> None:
    # Steps of 0.01 keep the label, steps of 0.2 change it.
    levels, labels = [], []
    for block in range(6):
        levels += [0.2 * block + 0.01 * step for step in range(5)]
        labels += [block] * 5
    gate = find_gate([watched(levels, labels)], min_agreement=0.99, max_repeats=8)
    assert gate is not None
    assert 0.04 - 1e-6 <= gate.threshold < 0.16 + 1e-6
    found = replay([watched(levels, labels)], gate)
    assert (found.num_repeated, found.agreement) == (24, 1.0)


def test_no_gate_where_nothing_may_be_repeated() -> None:
    levels = [0.0, 0.0, 0.0, 0.0]
    assert find_gate([watched(levels, [0, 1, 2, 3])], min_agreement=0.99, max_repeats=4) is None
    with pytest.raises(InputError, match="at least one video"):
        find_gate([], min_agreement=0.99, max_repeats=4)


def test_repeating_a_still_stream_ends_after_a_window() -> None:
    calls = []

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2)

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            calls.append(float(clips.mean()))
            return self.head(clips.mean(dim=(1, 2, 3, 4))[:, None])

    clip = ClipSpec(num_frames=4, height=16, width=16)
    model = wrap_module(Bright(), name="bright", options=LoadOptions(), clip=clip, task="classify")
    gate = Gate(signal="mean", threshold=0.01, max_repeats=2)
    repeating = Repeating(model, clip, gate)
    calls.clear()
    still = np.full((4, 16, 16, 3), 51, np.uint8)
    answers = [repeating.step(still)]
    answers += [repeating.step(still[:2]) for _ in range(6)]
    # Computed, two repeats, computed, two repeats, computed.
    assert [answer.repeated for answer in answers] == [False, True, True] * 2 + [False]
    assert calls == pytest.approx([0.2] * 3)
    # A change is answered anew at once.
    assert not repeating.step(np.full((2, 16, 16, 3), 255, np.uint8)).repeated
    assert calls[-1] == pytest.approx(0.6)
