"""V-JEPA 2: loaded whole, described without its predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vcompress.models.load import LoadOptions, load_model
from vcompress.spec.errors import InputError

CONFIG: dict[str, Any] = {
    "patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "tubelet_size": 2, "hidden_size": 48,
    "num_attention_heads": 4, "num_hidden_layers": 3, "mlp_ratio": 2, "num_pooler_layers": 2,
    "pred_hidden_size": 48, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 2,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}  # fmt: skip


def recogniser() -> Any:
    torch.manual_seed(0)
    return transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**CONFIG)).eval()


def save_pt(path: Path) -> str:
    state = recogniser().state_dict()
    torch.save({"family": "vjepa2", "config": CONFIG, "state_dict": state}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
def test_it_loads_and_its_predictor_is_not_in_the_way(tmp_path: Path, kind: str) -> None:
    module = recogniser()
    if kind == "checkpoint":
        model = load_model(save_pt(tmp_path / "m.pt"))
    else:
        module.save_pretrained(tmp_path)
        model = load_model(str(tmp_path))
    grid = model.token_grid
    assert grid is not None
    assert (grid.frames, grid.height, grid.width, grid.special) == (2, 4, 4, 0)
    assert (grid.arrangement, grid.readers, grid.rotary) == ("joint", ("pooler",), True)
    assert model.token_blocks == tuple(f"vjepa2.encoder.layer.{index}" for index in range(3))
    assert (model.pooling, model.labels, model.task) == ("attention", ("a", "b", "c"), "classify")
    # The pooler's blocks are blocks too, for precision, but no tokens are reduced in front of them.
    assert model.blocks[3:] == ("pooler.self_attention_layers.0", "pooler.self_attention_layers.1")
    names = (*model.blocks, *model.layers, *model.module.state_dict())
    assert not any("predictor" in name for name in names)
    torch.save({"family": "vjepa2", "config": CONFIG, "state_dict": model.module.state_dict()},
               tmp_path / "again.pt")  # fmt: skip
    assert load_model(str(tmp_path / "again.pt")).weights_sha256 == model.weights_sha256
    assert model.clip.mean == (0.485, 0.456, 0.406)
    clips = model.example(2)
    assert clips.shape == (2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(clips), module(clips).logits, atol=1e-6)


def test_the_grid_follows_clips_of_another_length(tmp_path: Path) -> None:
    options = LoadOptions(input_spec="NTCHW:float32:1x8x3x32x32")
    grid = load_model(save_pt(tmp_path / "m.pt"), options).token_grid
    assert grid is not None
    assert grid.frames == 4
    # Frames that are no multiple of a patch: the model cuts the edge off.
    options = LoadOptions(input_spec="NTCHW:float32:1x4x3x36x32")
    grid = load_model(save_pt(tmp_path / "m.pt"), options).token_grid
    assert grid is not None
    assert grid.height == 4


def test_an_encoder_with_its_predictor_is_refused(tmp_path: Path) -> None:
    recogniser().vjepa2.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="must hold a VJEPA2ForVideoClassification, got a VJEPA2M"):
        load_model(str(tmp_path))
