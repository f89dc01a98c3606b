"""Clips that a prediction rests on: drawn by what they can lose, and weighted for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vcompress.calib.calls import Calls
from vcompress.calib.calls import _Row as Row
from vcompress.calib.clips import Clips
from vcompress.compress.clip_choice import choose_clips, fit_and_judge
from vcompress.compress.losses import TaskLoss, loss_of
from vcompress.models.calls import Call
from vcompress.models.video import VideoModel

MakeClips = Callable[..., Clips]
KL = TaskLoss("kl_nats")


def logits(count: int) -> torch.Tensor:
    """One clip in ten is unsure."""
    result = torch.zeros(count, 4)
    result[:, 0] = 4.0
    result[::10] = torch.tensor([1.0, 1.0, -3.0, -3.0])
    return result


def test_unsure_clips_are_preferred_and_the_mean_stays(
    transformer: VideoModel, make_clips: MakeClips
) -> None:
    clips, outputs = make_clips(transformer, 60), logits(60)
    truth = KL.curvature(outputs)
    means, unsure = [], []
    for seed in range(200):
        chosen = choose_clips(clips, 12, KL, outputs, seed)
        weights = torch.cat(chosen.weights)
        assert len(chosen) == len(weights) == 12
        assert [len(batch) for batch in chosen.batches] == [8, 4]
        assert chosen.indices == sorted(chosen.indices)
        means.append(float((truth[chosen.indices] * weights).mean()))
        unsure.append(sum(index % 10 == 0 for index in chosen.indices))
    assert sum(means) / 200 == pytest.approx(float(truth.mean()), rel=0.02)
    assert float(torch.tensor(means).std()) < 0.3 * float(truth.mean())
    # At even distances they would be 1.2.
    assert sum(unsure) / 200 > 4
    again = choose_clips(clips, 12, KL, outputs, 3)
    assert again.indices == choose_clips(clips, 12, KL, outputs, 3).indices
    assert torch.equal(again.batches[0], torch.from_numpy(clips.data[again.indices[:8]]))


@pytest.mark.parametrize("case", ["no outputs", "other loss", "few clips", "broken", "certain"])
def test_otherwise_clips_are_at_even_distances(
    transformer: VideoModel, make_clips: MakeClips, case: str
) -> None:
    count = 10 if case == "few clips" else 20
    outputs: torch.Tensor | None = logits(count)
    assert outputs is not None
    if case == "no outputs":
        outputs = None
    elif case == "broken":
        outputs[3] = torch.nan
    elif case == "certain":
        outputs[:, 0] = 200.0
    loss = loss_of("restore") if case == "other loss" else KL
    chosen = choose_clips(make_clips(transformer, count), 10, loss, outputs, 0)
    assert chosen.indices == [index * count // 10 for index in range(10)]
    assert torch.cat(chosen.weights).tolist() == [1.0] * 10


def test_whole_generations_are_held_out() -> None:
    call = Call(tensors={"x": torch.zeros(12, 4)})
    rows = [
        Row(call=call, row=index, generation=index // 3, step=index % 3, name=f"call {index}")
        for index in range(12)
    ]
    calls = Calls(module_class="Denoiser", rows=tuple(rows))
    fitted, judged = fit_and_judge(calls)
    assert isinstance(fitted, Calls)
    assert isinstance(judged, Calls)
    assert set(fitted.generations) == {0, 2, 3}
    assert set(judged.generations) == {1}
    assert (len(fitted), len(judged)) == (9, 3)
    # One generation alone is divided by its steps.
    fitted, judged = fit_and_judge(calls[:3])
    assert judged is not None
    assert (len(fitted), len(judged)) == (2, 1)
