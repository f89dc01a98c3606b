"""Where models are cut, family by family, and that what follows has all bits of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.compress.stream.cut import Cut, Uncut, find_cut
from vcompress.models.load import ADAPTERS, LoadOptions, wrap_module
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec

FRAMES, SIZE = 8, 16
SHARED: dict[str, Any] = {
    "num_frames": FRAMES, "image_size": SIZE, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "num_hidden_layers": 3, "patch_size": 4,
}  # fmt: skip
VIDEOPRISM: dict[str, Any] = {
    name: value for name, value in SHARED.items() if name not in ("num_hidden_layers", "patch_size")
} | {"tubelet_size": [1, 4, 4], "num_spatial_layers": 3, "num_temporal_layers": 2}
CUT_BEHIND: dict[str, tuple[Mapping[str, Any], str]] = {
    "videoprism_vision_model": (VIDEOPRISM, "vision_model.layernorm1"),
    "clip_vision_model": (SHARED, "tower"),
    "siglip_vision_model": (SHARED, "tower"),
    "dinov2": (SHARED, "tower.layernorm"),
    "dinov2_with_registers": (SHARED, "tower.layernorm"),
}
VJEPA2: dict[str, Any] = {
    "frames_per_clip": FRAMES, "crop_size": SIZE, "patch_size": 4, "hidden_size": 32,
    "num_attention_heads": 2, "num_hidden_layers": 3, "mlp_ratio": 2, "num_pooler_layers": 1,
    "pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip
JOINT: dict[str, Mapping[str, Any]] = {
    "videomae": SHARED,
    "vivit": SHARED | {"tubelet_size": [2, 4, 4]},
    "timesformer": SHARED,
    "vjepa2": VJEPA2,
}


def build(family: str, config: Mapping[str, Any]) -> VideoModel:
    torch.manual_seed(0)
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.family == family]
    module = adapter.build(dict(config))
    with torch.no_grad():
        for parameter in module.parameters():
            # Position embeddings begin at zero, and would hide where they are added.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return wrap(module, adapter.describe(config).clip)


def wrap(module: nn.Module, clip: ClipSpec | None = None) -> VideoModel:
    clip = clip or ClipSpec(num_frames=FRAMES, height=SIZE, width=SIZE)
    return wrap_module(module, name="m", options=LoadOptions(), clip=clip, task="classify")


def cut_of(model: VideoModel, stride: int) -> Cut | Uncut:
    return find_cut(model, model.clip, stride=stride)


def assert_equal_windows(model: VideoModel, cut: Cut, stride: int) -> None:
    """Slide over random frames; every window must have the bits of the model."""
    frames = torch.rand(1, FRAMES + 4 * stride, 3, SIZE, SIZE)
    chunk = cut.stages.chunk
    rows = torch.cat([
        cut.stages.encode(frames[:, start : start + chunk])
        for start in range(0, frames.shape[1], chunk)
    ])  # fmt: skip
    per_chunk = cut.stages.rows * chunk // FRAMES
    for start in range(0, 4 * stride + 1, stride):
        first = start // chunk * per_chunk
        got = cut.stages.answer(rows[first : first + cut.stages.rows])
        assert torch.equal(got, model(frames[:, start : start + FRAMES]))


@pytest.mark.parametrize("family", CUT_BEHIND)
def test_factorised_encoders_are_cut_behind_their_spatial_stage(family: str) -> None:
    config, behind = CUT_BEHIND[family]
    model = build(family, config)
    cut = cut_of(model, 2)
    assert isinstance(cut, Cut)
    assert cut.module.startswith(behind)
    assert cut.difference == 0
    assert cut.operations < 0.6
    assert_equal_windows(model, cut, 2)


def test_strides_that_do_not_divide_the_window() -> None:
    model = build("videoprism_vision_model", VIDEOPRISM)
    cut = cut_of(model, 3)
    assert isinstance(cut, Cut)
    assert cut.stages.chunk == 1
    assert_equal_windows(model, cut, 3)


@pytest.mark.parametrize("family", JOINT)
def test_joint_models_are_not_cut(family: str) -> None:
    # Position or attention comes first: what is left to keep is the embedding of patches.
    found = cut_of(build(family, JOINT[family]), 2)
    assert isinstance(found, Uncut)
    assert "only in its first" in found.reason or "mixes frames" in found.reason


class Tubes(nn.Module):
    """Features of two frames each, then a mean over time; `early` adds a position before that."""

    def __init__(self, early: bool = False, bypass: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4))
        self.moments = nn.Parameter(torch.randn(1, 4, 16))
        self.wide = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 5)
        self.early, self.bypass = early, bypass

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        tubes = self.embed(clips.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        tokens = tubes.flatten(0, 1)
        if self.early:
            tokens = tokens + self.moments[0, : len(tokens), None]
        features = self.wide(tokens)
        if self.bypass:
            features = features + tokens
        rows = features.unflatten(0, tubes.shape[:2]) + self.moments[:, : tubes.shape[1], None]
        return self.head(rows.tanh().mean(dim=(1, 2)))


def test_a_stride_that_splits_tubelets_is_told_with_the_remedy() -> None:
    torch.manual_seed(0)
    model = wrap(Tubes())
    assert isinstance(cut_of(model, 2), Cut)
    found = cut_of(model, 3)
    assert isinstance(found, Uncut)
    assert "from 2 frames" in found.reason
    assert found.reason.endswith("use --stride 2")


def test_a_residual_around_the_last_module_moves_the_cut() -> None:
    torch.manual_seed(0)
    plain, around = cut_of(wrap(Tubes()), 2), cut_of(wrap(Tubes(bypass=True)), 2)
    assert isinstance(plain, Cut)
    assert plain.module == "wide"
    # `wide` alone does not hold what the residual carries, so the cut is before it.
    assert isinstance(around, Cut)
    assert around.module == "embed"


def test_a_position_before_the_features_moves_the_cut() -> None:
    torch.manual_seed(0)
    found = cut_of(wrap(Tubes(early=True)), 2)
    assert isinstance(found, Cut)
    assert found.module == "embed"


class Fixed(Tubes):
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.shape[1] != FRAMES:
            message = "eight frames only"
            raise ValueError(message)
        return super().forward(clips)


def test_a_model_of_one_length_only_says_so() -> None:
    found = cut_of(wrap(Fixed()), 2)
    assert isinstance(found, Uncut)
    assert "does not run on 2 of its 8 frames: ValueError: eight frames only" in found.reason


def test_the_model_is_left_as_it_is() -> None:
    model = build("dinov2", SHARED)
    clip = torch.rand(1, *model.clip.input_shape)
    before, names = model(clip), [name for name, _ in model.module.named_modules()]
    cut = cut_of(model, 2)
    assert isinstance(cut, Cut)
    assert torch.equal(model(clip), before)
    assert [name for name, _ in model.module.named_modules()] == names
    assert not any(module._forward_hooks for module in model.module.modules())
    # The tensors are shared, so that a stream costs no second copy of the weights.
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    assert not cut.stages.encode(clip[:, :2]).any()


def test_other_layouts() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tubes = Tubes()

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.tubes(clips.permute(0, 1, 4, 2, 3).float() / 255)

    torch.manual_seed(0)
    clip = ClipSpec(
        num_frames=FRAMES, height=SIZE, width=SIZE, layout="NTHWC", dtype="uint8", rescale=1.0
    )
    assert isinstance(cut_of(wrap(Permuted(), clip), 2), Cut)
    wide = replace(clip, layout="NCTHW", dtype="float32")

    class Volume(Permuted):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.tubes(clips.transpose(1, 2))

    assert isinstance(cut_of(wrap(Volume(), wide), 4), Cut)
