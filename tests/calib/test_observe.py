"""Watching layers; every expected maximum is worked out by hand or by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.calib.observe import observe
from vcompress.calib.stats import NEEDS, Stats
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

SPEC = ClipSpec(num_frames=2, height=4, width=4, layout="NCTHW")
ALL = frozenset({"input_amax", "input_channel_amax"})


class Model(nn.Module):
    """A tubelet embedding, a linear called twice and by keyword, and a layer nobody reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, 2, 2)
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(clips).flatten(2).transpose(1, 2)
        tokens = self.twice(tokens)
        result: torch.Tensor = self.twice(input=tokens)
        return result


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def clips() -> Clips:
    frames = np.random.RandomState(0).randint(0, 256, (7, 2, 4, 4, 3), np.uint8)
    return Clips.from_frames(frames, SPEC)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if name}


def num_hooks(model: nn.Module) -> int:
    return sum(len(layer._forward_pre_hooks) for layer in model.modules())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_maxima_over_all_calls(model: Model, clips: Clips, batch_size: int) -> None:
    done: list[int] = []
    stats = observe(
        model, layers_of(model), clips, needs=ALL, batch_size=batch_size, on_batch=done.append
    )
    inputs = torch.from_numpy(np.stack(list(clips)))
    with torch.no_grad():
        first = model.embed(inputs).flatten(2).transpose(1, 2)
        second = model.twice(first)
    assert stats.input_channel_amax["embed"].equal(inputs.abs().amax((0, 2, 3, 4)))
    tokens = torch.cat([first, second]).abs()
    torch.testing.assert_close(stats.input_channel_amax["twice"], tokens.amax((0, 1)))
    assert stats.input_amax["embed"] == inputs.abs().max().item()
    assert stats.input_amax["twice"] == pytest.approx(tokens.max().item(), rel=1e-6)
    num_batches = -(-7 // batch_size)
    assert stats.calls == {"embed": num_batches, "twice": 2 * num_batches, "unused": 0}
    assert set(stats.input_amax) == set(stats.input_channel_amax) == {"embed", "twice"}
    assert stats.num_clips == sum(done) == 7
    assert len(done) == num_batches
    assert stats.calib_sha256 == clips.digest
    assert num_hooks(model) == 0


@pytest.mark.parametrize("need", sorted(ALL))
def test_only_what_is_needed_is_collected(model: Model, clips: Clips, need: str) -> None:
    both = observe(model, layers_of(model), clips, needs=ALL)
    one = observe(model, layers_of(model), clips, needs=frozenset({need}))
    other = next(iter(ALL - {need}))
    assert getattr(one, other) == {}
    if need == "input_amax":
        assert one.input_amax == both.input_amax
    else:
        assert one.input_channel_amax["twice"].equal(both.input_channel_amax["twice"])


def test_nothing_needed(model: Model, clips: Clips) -> None:
    stats = observe(model, layers_of(model), clips, needs=frozenset())
    assert stats.input_amax == stats.input_channel_amax == {}
    assert stats.calls["embed"] == 1
    nothing = Stats.nothing(clips)
    assert (nothing.num_clips, nothing.calib_sha256) == (7, clips.digest)
    assert nothing.calls == nothing.input_amax == nothing.input_channel_amax == {}


def test_outputs_are_kept_while_they_are_small(model: Model, clips: Clips) -> None:
    needs = frozenset({"outputs"})
    stats = observe(model, {}, clips, needs=needs, batch_size=3)
    assert stats.outputs is not None
    with torch.no_grad():
        expected = model(torch.from_numpy(np.stack(list(clips))))
    torch.testing.assert_close(stats.outputs, expected)
    assert observe(model, {}, clips, needs=frozenset()).outputs is None
    for large_or_other in (
        lambda batch: torch.zeros(len(batch), 2**14 + 1),
        lambda batch: torch.zeros(len(batch) + 1),
        lambda batch: [batch],
    ):
        assert observe(large_or_other, {}, clips, needs=needs).outputs is None


def watch(layer: nn.Module, value: torch.Tensor) -> Stats:
    """The statistics of one layer that is called with `value` once."""
    frames = np.zeros((1, 2, 4, 4, 3), np.uint8)
    return observe(
        lambda _: layer(value), {"layer": layer}, Clips.from_frames(frames, SPEC), needs=ALL
    )


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(5, 2), (5,), 0),
        (nn.Linear(5, 2), (2, 3, 4, 5), 3),
        (nn.Conv1d(5, 2, 1), (3, 5, 4), 1),
        (nn.Conv2d(5, 2, 1), (3, 5, 4, 6), 1),
        (nn.Conv2d(5, 2, 1), (5, 4, 6), 0),  # without a batch axis
        (nn.Conv3d(5, 2, 1), (3, 5, 2, 4, 6), 1),
        (nn.ConvTranspose2d(5, 2, 1), (3, 5, 4, 6), 1),
    ],
)
def test_the_channel_axis(layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    # Channel k holds values up to k + 1 in size, of either sign.
    value = torch.zeros(shape)
    for channel in range(5):
        part = value.select(axis, channel)
        (part if part.ndim else value[channel : channel + 1]).fill_((channel + 1) * (-1) ** channel)
    stats = watch(layer, value)
    assert stats.input_channel_amax["layer"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert stats.input_amax["layer"] == 5.0


def test_half_precision_and_negative_maxima() -> None:
    value = torch.tensor([[-3.0, 1.0, 0.5]], dtype=torch.bfloat16)
    stats = watch(nn.Linear(3, 2, dtype=torch.bfloat16), value)
    assert stats.input_amax["layer"] == 3.0
    assert stats.input_channel_amax["layer"].dtype == torch.float32
    assert stats.input_channel_amax["layer"].tolist() == [3.0, 1.0, 0.5]


def test_an_empty_input_is_a_call_without_a_maximum() -> None:
    stats = watch(nn.Linear(3, 2), torch.zeros(0, 3))
    assert stats.calls == {"layer": 1}
    assert stats.input_amax == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("needs", [ALL, frozenset({"input_amax"})])
def test_not_finite_names_the_first_layer_and_the_clips(
    model: Model, clips: Clips, value: float, needs: frozenset[str]
) -> None:
    def forward(batch: torch.Tensor) -> torch.Tensor:
        if forward.calls == 1:  # the second batch, clips 3 to 5
            batch[1, 2, 0, 1, 1] = value
        forward.calls += 1
        result: torch.Tensor = model(batch)
        return result

    forward.calls = 0
    order = dict(reversed(layers_of(model).items()))
    with pytest.raises(InputError, match="layer embed holds NaN or infinity for clips 3 to 5"):
        observe(forward, order, clips, needs=needs, batch_size=3)
    assert num_hooks(model) == 0


def test_hooks_go_when_the_model_fails(model: Model, clips: Clips) -> None:
    def forward(batch: torch.Tensor) -> None:
        model(batch)
        assert num_hooks(model) == 3
        raise RuntimeError

    with pytest.raises(RuntimeError):
        observe(forward, layers_of(model), clips, needs=ALL)
    assert num_hooks(model) == 0


def test_no_gradient_is_kept(model: Model, clips: Clips) -> None:
    seen: list[bool] = []

    def forward(batch: torch.Tensor) -> None:
        seen.append(torch.is_inference_mode_enabled() and not model(batch).requires_grad)

    stats = observe(forward, layers_of(model), clips, needs=ALL)
    assert seen == [True]
    assert not stats.input_channel_amax["embed"].requires_grad


def test_a_need_that_does_not_exist_is_a_bug(model: Model, clips: Clips) -> None:
    with pytest.raises(ValueError, match=r"unknown statistics \['hessian'\]") as caught:
        observe(model, {}, clips, needs=frozenset({"hessian"}))
    assert not isinstance(caught.value, InputError)
    assert ALL | {"outputs"} == NEEDS


def test_one_module_under_two_names(clips: Clips) -> None:
    layer = nn.Conv3d(3, 4, 1)
    forward: Callable[[torch.Tensor], Any] = layer
    stats = observe(forward, {"a": layer, "b": layer}, clips, needs=ALL)
    assert stats.input_amax["a"] == stats.input_amax["b"]
