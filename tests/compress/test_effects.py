"""Predicted losses against brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from vcompress.calib.clips import Clips
from vcompress.calib.observe import observe
from vcompress.compress import effects
from vcompress.compress.brute_force import measure_losses, reference_outputs
from vcompress.compress.clip_choice import batches_of
from vcompress.compress.effects import Candidates, predict_effects
from vcompress.compress.losses import loss_of
from vcompress.compress.sensitivities import freeze_candidates, predict_sensitivities
from vcompress.models.video import VideoModel

FORMATS = ("nvfp4", "mxfp8", "fp8", "int8")
Wrap = Callable[..., VideoModel]
MakeClips = Callable[..., Clips]


def candidates_of(model: VideoModel, clips: Clips, formats: tuple[str, ...]) -> Candidates:
    layers = {name: model.layer(name) for name in model.layers}
    stats = observe(model, layers, clips, needs=frozenset({"input_amax"}))
    return freeze_candidates(model, formats, stats.input_amax)


def compared(
    model: VideoModel, clips: Clips, formats: tuple[str, ...] = FORMATS, probes: int = 8
) -> dict[tuple[str, str], tuple[float, float]]:
    """(layer, format) -> predicted and true loss, on the same clips."""
    candidates = candidates_of(model, clips, formats)
    batches = batches_of(clips, len(clips))
    loss = loss_of(model.task)
    found = predict_effects(model, candidates, iter(batches), loss, num_probes=probes)
    assert found.unreached == ()
    measured = measure_losses(model, candidates, batches, reference_outputs(model, batches), loss)
    return {
        (layer, name): (found.loss(layer, name), measured[layer][name])
        for layer, each in candidates.items()
        for name in each
    }


def test_ranks_of_a_transformer_are_those_of_brute_force(
    transformer: VideoModel, make_clips: MakeClips
) -> None:
    pairs = compared(transformer, make_clips(transformer, 24))
    assert len(pairs) == 14 * len(FORMATS) - 2  # a convolution takes fp8 and int8
    predicted, measured = zip(*pairs.values(), strict=True)
    assert spearmanr(predicted, measured).statistic > 0.9
    nvfp4 = [pair for (_, name), pair in pairs.items() if name == "nvfp4"]
    assert spearmanr(*zip(*nvfp4, strict=True)).statistic > 0.9
    assert all(0.3 < ours / true < 3 for ours, true in pairs.values())


class Chain(nn.Module):
    """Linear from end to end, with tokens in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(clips.flatten(3).flatten(1, 2))).mean(1))


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_model_is_predicted_exactly(
    wrap: Wrap, make_clips: MakeClips, format: str
) -> None:
    model = wrap(Chain())
    for ours, true in compared(model, make_clips(model, 64), (format,), probes=16).values():
        # 1024 samples: two standard deviations of the mean of squares are 9 %.
        assert ours == pytest.approx(true, rel=0.15)


class Layouts(nn.Module):
    """The axis of clips goes through a layer at another place, or mixed with another."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.inner, self.head = layout, nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.flatten(3).flatten(1, 2)  # B, 12, 64
        count = len(x)
        if self.layout == "tokens first":
            y = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "interleaved":
            y = self.inner(x.transpose(0, 1).flatten(0, 1))
            y = y.unflatten(0, (12, count)).transpose(0, 1)
        elif self.layout == "folded":
            y = self.inner(x.flatten(0, 1)).unflatten(0, (count, 12))
        else:
            # One result for all clips.
            y = torch.cat([self.inner(torch.linspace(-1, 1, 64)[None]).expand(count, -1)[:, None],
                           x[..., :32]], 1)  # fmt: skip
        return self.head(y.mean(1))


@pytest.mark.parametrize("layout", ["tokens first", "interleaved", "folded", "one for all"])
def test_clips_are_told_apart_wherever_they_are(
    wrap: Wrap, make_clips: MakeClips, layout: str
) -> None:
    model = wrap(Layouts(layout))
    pairs = compared(model, make_clips(model, 64), ("nvfp4",), probes=16)
    ours, true = pairs["inner", "nvfp4"]
    assert ours == pytest.approx(true, rel=0.35 if layout == "one for all" else 0.15)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.flatten(3).mean((1, 2))
        return self.last(self.shared(input=self.shared(x)))


def test_a_layer_that_is_called_twice_or_by_keyword(wrap: Wrap, make_clips: MakeClips) -> None:
    model = wrap(Twice())
    for ours, true in compared(model, make_clips(model, 64), ("nvfp4",), probes=16).values():
        assert ours == pytest.approx(true, rel=0.2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv3d(3, 32, 2, stride=2)
        self.body = nn.Conv3d(32, 32, 1)
        self.norm, self.mixed, self.head = nn.BatchNorm3d(32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        # Strides of a video that was read as [B, T, H, W, C].
        x = self.stem(clips.contiguous(memory_format=torch.channels_last_3d))
        x = torch.relu_(x)
        y = torch.relu_(self.norm(self.body(x)))
        y += x
        y.relu_()
        z = y.mean((2, 3, 4))
        h = self.mixed(z)
        z += h
        return self.head(z.relu_())


def test_models_that_work_in_place(wrap: Wrap, make_clips: MakeClips) -> None:
    model = wrap(InPlace())
    clips = make_clips(model, 32)
    before = model(torch.from_numpy(clips[:8].data))
    pairs = compared(model, clips)
    assert {layer for layer, _ in pairs} == set(model.layers)
    predicted, measured = zip(*pairs.values(), strict=True)
    assert spearmanr(predicted, measured).statistic > 0.85
    assert torch.equal(model(torch.from_numpy(clips[:8].data)), before)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


class Cut(nn.Module):
    """No gradient leads past `cut`."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.front, self.back = cut, nn.Linear(64, 32), nn.Linear(32, 16)
        self.unused = nn.Linear(32, 16)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.flatten(3).mean((1, 2))
        if self.cut == "no_grad":
            with torch.no_grad():
                x = self.front(x)
            return self.back(x)
        x = self.front(x)
        if self.cut == "argmax":
            x = functional.one_hot(x.argmax(-1), 32).float()
        elif self.cut == "round":
            x = (4 * x).round() / 4
        else:
            x = x.detach()
        return self.back(x)


@pytest.mark.parametrize("cut", ["argmax", "no_grad", "detach", "round"])
def test_layers_without_gradient_are_reported_and_measured(
    wrap: Wrap, make_clips: MakeClips, cut: str
) -> None:
    model = wrap(Cut(cut))
    clips = make_clips(model, 32)
    candidates = candidates_of(model, clips, ("nvfp4",))
    found = predict_sensitivities(model, candidates, clips, num_clips=32, num_probes=4, seed=0)
    assert found.effects.unreached == ("front",)
    assert set(found.measured) == {"front"}
    batches = batches_of(clips, 32)
    measured = measure_losses(
        model, candidates, batches, reference_outputs(model, batches), found.loss
    )
    assert found.of("front", "nvfp4") == measured["front"]["nvfp4"] > 0
    assert "unused" not in model.layers
    # A joint loss passes over what was not predicted.
    formats = {"front": "nvfp4", "back": "nvfp4"}
    assert found.effects.joint_loss(formats) == pytest.approx(found.effects.loss("back", "nvfp4"))


def test_no_gradient_at_all(wrap: Wrap, make_clips: MakeClips) -> None:
    class Whole(Cut):
        @torch.inference_mode()
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return super().forward(clips)

    model = wrap(Whole("detach"))
    clips = make_clips(model, 8)
    candidates = candidates_of(model, clips, ("nvfp4", "int8"))
    found = predict_sensitivities(model, candidates, clips, num_clips=8, num_probes=2, seed=0)
    assert found.effects.unreached == ("front", "back")
    assert all(found.of(layer, "nvfp4") for layer in ("front", "back"))


def test_the_joint_loss_sees_what_cancels(wrap: Wrap, make_clips: MakeClips) -> None:
    class Opposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.plus, self.minus, self.rest = (nn.Linear(64, 16) for _ in range(3))
            self.minus.load_state_dict(self.plus.state_dict())

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            x = clips.flatten(3).mean((1, 2))
            return self.plus(x) - self.minus(x) + self.rest(x)

    model = wrap(Opposed())
    clips = make_clips(model, 16)
    candidates = candidates_of(model, clips, ("nvfp4",))
    found = predict_effects(
        model, candidates, iter(batches_of(clips, 16)), loss_of("generic"), num_probes=4
    )
    joint = found.joint_loss({"plus": "nvfp4", "minus": "nvfp4"})
    assert joint < 1e-9 * found.loss("plus", "nvfp4")
    assert found.joint_loss({"plus": "keep"}) == 0


def test_fewer_clips_at_once_where_activations_are_large(
    transformer: VideoModel, make_clips: MakeClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_clips(transformer, 8)
    candidates = candidates_of(transformer, clips, ("nvfp4", "int8"))
    first = next(iter(clips.tensors(8)))
    many = effects.clips_that_fit(transformer, candidates, first)
    assert many > 8
    batches: list[int] = []

    def predicted() -> list[float]:
        batches.clear()
        found = predict_sensitivities(
            transformer, candidates, clips, num_clips=8, num_probes=8, seed=0,
            on_batch=batches.append,
        )  # fmt: skip
        return [found.of(name, each) or 0.0 for name in candidates for each in candidates[name]]

    together = predicted()
    assert batches == [8]
    # So that three clips fit.
    monkeypatch.setattr(effects, "_HELD_BYTES", int(3.5 / many * effects._HELD_BYTES))
    apart = predicted()
    assert batches == [3, 3, 2]
    assert spearmanr(together, apart).statistic > 0.9
