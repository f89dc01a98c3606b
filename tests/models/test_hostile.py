"""Models and checkpoints as users have them: odd, damaged, or built from torch's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.compress.frozen import FrozenLayer
from vcompress.models.directory import clip_from_processor
from vcompress.models.load import LoadOptions, load_model, parse_input_spec, wrap_module
from vcompress.pipeline import Options, apply_plan, make_plan
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

OPTIONS = LoadOptions(input_spec="NCTHW:float32:1x3x4x16x16")
CONFIG = {
    "image_size": 16, "patch_size": 8, "num_channels": 3, "num_frames": 4, "tubelet_size": 2,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "num_labels": 3,
}  # fmt: skip


class Encoder(nn.Module):
    """Torch's own transformer, which has a fused kernel for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 32, (2, 8, 8), (2, 8, 8))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens).mean(1))


class Padded(nn.Module):
    """A convolution whose padding is not zero, and a linear that is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1, padding_mode="replicate")
        self.a = nn.Linear(16, 16)
        self.b = nn.Sequential(self.a, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.first(x).mean((2, 3, 4))))


def planned(module: nn.Module) -> tuple[Any, Any]:
    model = wrap_module(module, name="m", options=OPTIONS)
    frames = np.random.default_rng(0).integers(0, 256, (4, 4, 16, 16, 3), np.uint8)
    clips = Clips.from_frames(frames, model.clip, labels=None, names=None)
    options = Options(target="int8", calib="x", max_layer_error=1.0)
    plan, smoothing = make_plan(model, clips, options)
    result = apply_plan(model, plan, smoothing)
    x = torch.from_numpy(next(clips.batches(2)))
    expected = model(x)
    error = torch.linalg.vector_norm(result(x) - expected) / torch.linalg.vector_norm(expected)
    assert 0 < float(error) < 0.1
    return plan, result


def test_torchs_own_transformer_encoder_runs_its_quantized_layers() -> None:
    torch.manual_seed(0)
    plan, result = planned(Encoder())
    assert plan.quantize["encoder.layers.1.linear2"].format == "int8"
    called: list[str] = []
    layer = result.layer("encoder.layers.1.linear2")
    assert isinstance(layer, FrozenLayer)
    layer.quantized_input = lambda x: (called.append("input"), x)[1]  # type: ignore[method-assign]
    result(result.example())
    assert called == ["input"]


def test_padding_that_no_format_takes_keeps_the_layer_with_a_reason() -> None:
    torch.manual_seed(0)
    plan, result = planned(Padded())
    assert plan.quantize["first"].format == "keep"
    assert "pads by replicate" in plan.quantize["first"].reason
    assert isinstance(result.layer("a"), FrozenLayer)
    assert result.layer("b.0") is result.layer("a")


def test_half_precision_is_loaded_as_float32() -> None:
    model = wrap_module(Encoder().bfloat16(), name="m", options=OPTIONS)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_a_model_that_returns_no_tensor_is_an_input_error() -> None:
    class Nothing(Encoder):
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)

    with pytest.raises(InputError, match="must return a tensor"):
        wrap_module(Nothing(), name="m", options=OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"config": 5}, {"config": None}, {"labels": 5}, {"clip": 5}, {"clip": {"num_frames": "4"}},
        {"config": {**CONFIG, "hidden_size": -4}}, {"config": {**CONFIG, "tubelet_size": 0}},
        {"config": {**CONFIG, "num_frames": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_description_is_an_input_error(tmp_path: Path, change: dict[str, Any]) -> None:
    stored = {"family": "videomae", "config": CONFIG, "state_dict": {"x": torch.zeros(1)}}
    if "clip" in change and isinstance(change["clip"], dict):
        with pytest.raises(InputError):
            ClipSpec.from_dict(change["clip"])
        return
    torch.save({**stored, **change}, tmp_path / "m.pt")
    with pytest.raises(InputError):
        load_model(str(tmp_path / "m.pt"))


def test_labels_and_clip_of_a_checkpoint_reach_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    clip = {"num_frames": 4, "height": 16, "width": 16, "mean": [0.5], "std": [0.2]}
    torch.save(
        {"state_dict": network.state_dict(), "labels": ["a", "b"], "clip": clip}, tmp_path / "m.pt"
    )
    model = load_model(str(tmp_path / "m.pt"), LoadOptions(arch="own_network:build"))
    assert (model.labels, model.clip.std, model.task) == (("a", "b"), (0.2,), "classify")


def test_a_file_of_the_users_that_does_not_parse_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_network.py").write_text("def build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="SyntaxError"):
        load_model("broken_network:build")


def test_digits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="five sizes"):
        parse_input_spec("NCTHW:float32:1x3x\u00b2x16x16")


def test_the_offset_of_vivits_processor_is_part_of_the_mean(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"offset": true, "rescale_factor": 0.00784313725490196, "image_mean": [0.5, 0.5, 0.5], '
        '"image_std": [0.5, 0.5, 0.5]}'
    )
    clip = clip_from_processor(tmp_path, ClipSpec(num_frames=4, height=16, width=16))
    # 255 * 2 / 255 - 1 = 1, then (1 - 0.5) / 0.5 = 1.
    assert (255 * clip.rescale - clip.mean[0]) / clip.std[0] == pytest.approx(1.0)
