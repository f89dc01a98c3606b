"""Frame towers: every way in, the right grid, and the very embeddings that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError

COMMON: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
WIDE = {**COMMON, "intermediate_size": 64}
# By class: family, its configuration, special tokens, pooling, stem of the blocks.
TOWERS: dict[str, tuple[str, dict[str, Any], int, str, str]] = {
    "CLIPVisionModel": ("clip_vision_model", WIDE, 1, "class_token", "tower.encoder.layers"),
    "CLIPVisionModelWithProjection": (
        "clip_vision_model", {**WIDE, "projection_dim": 16}, 1, "class_token",
        "tower.vision_model.encoder.layers",
    ),
    "SiglipVisionModel": ("siglip_vision_model", WIDE, 0, "attention", "tower.encoder.layers"),
    "Dinov2Model": ("dinov2", {**COMMON, "mlp_ratio": 2}, 1, "class_token", "tower.encoder.layer"),
    "Dinov2WithRegistersModel": (
        "dinov2_with_registers", {**COMMON, "mlp_ratio": 2}, 5, "class_token",
        "tower.encoder.layer",
    ),
}  # fmt: skip


def tower_of(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    module = cls(cls.config_class(**{**TOWERS[name][1], **changes})).eval()
    for parameter in module.parameters():
        # Some of them begin as zeros, which would hide that they are read.
        nn.init.normal_(parameter, std=0.1)
    assert isinstance(module, nn.Module)
    return module


def save_pt(path: Path, name: str, state: dict[str, torch.Tensor], **changes: Any) -> str:
    family, config, *_ = TOWERS[name]
    config = {**config, "num_frames": 3, **changes}
    torch.save({"family": family, "config": config, "state_dict": state}, path)
    return str(path)


def embeddings(tower: Any, clips: torch.Tensor) -> torch.Tensor:
    """What transformers says of every frame, one frame at a time."""
    with torch.no_grad():
        outputs = [tower(clips[:, index]) for index in range(clips.shape[1])]
    return torch.stack(
        [out.image_embeds if "image_embeds" in out else out.pooler_output for out in outputs], 1
    )


def check(model: VideoModel, tower: nn.Module) -> None:
    _, _, special, pooling, stem = TOWERS[type(tower).__name__]
    grid = model.token_grid
    assert grid is not None
    assert (grid.frames, grid.height, grid.width, grid.special) == (3, 4, 4, special)
    assert (grid.arrangement, model.pooling, model.task) == ("frames", pooling, "embed")
    assert model.token_blocks == (f"{stem}.0", f"{stem}.1")
    clips = model.example(2)
    assert clips.shape == (2, 3, 3, 32, 32)
    assert torch.allclose(model(clips), embeddings(tower, clips), atol=1e-6)


def packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with what `LinearAttention` took apart put together again."""
    packed = dict(state)
    for name in state:
        stem, found, kind = name.rpartition(".query.")
        if found and f"{stem}.out_proj.{kind}" in state:
            parts = [packed.pop(f"{stem}.{part}.{kind}") for part in ("query", "key", "value")]
            packed[f"{stem}.in_proj_{kind}"] = torch.cat(parts)
    return packed


@pytest.mark.parametrize("name", TOWERS)
def test_a_checkpoint_has_the_names_of_transformers_or_our_own(tmp_path: Path, name: str) -> None:
    tower = tower_of(name)
    model = load_model(save_pt(tmp_path / "theirs.pt", name, dict(tower.state_dict())))
    check(model, tower)
    ours = load_model(save_pt(tmp_path / "ours.pt", name, packed(model.module.state_dict())))
    assert ours.weights_sha256 == model.weights_sha256


@pytest.mark.parametrize("name", TOWERS)
def test_a_directory_says_how_frames_are_normalised(tmp_path: Path, name: str) -> None:
    tower: Any = tower_of(name)
    tower.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_frames": 3}))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    )
    model = load_model(str(tmp_path))
    check(model, tower)
    assert model.clip.mean == (0.1, 0.2, 0.3)
    # The same with an eye on what version 5 of transformers writes for pictures and texts.
    data = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(f'{{"image_processor": {data}}}')
    assert load_model(str(tmp_path)).clip == model.clip


def test_without_a_word_there_are_eight_frames_and_the_usual_normalisation(tmp_path: Path) -> None:
    tower = tower_of("SiglipVisionModel")
    torch.save(
        {"family": "siglip_vision_model", "config": WIDE, "state_dict": tower.state_dict()},
        tmp_path / "m.pt",
    )
    clip = load_model(str(tmp_path / "m.pt")).clip
    # SigLIP's processor stretches pictures to the square.
    assert (clip.num_frames, clip.mean, clip.std, clip.resize) == (
        8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "exact",
    )  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
def test_names_of_older_versions_are_known(tmp_path: Path, gated: bool) -> None:
    # What `save_pretrained` writes still has the names of version 4.
    tower: Any = tower_of("Dinov2Model", use_swiglu_ffn=gated)
    tower.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in stored
    assert ("encoder.layer.0.mlp.weights_in.weight" in stored) == gated
    path = save_pt(tmp_path / "m.pt", "Dinov2Model", stored, use_swiglu_ffn=gated)
    check(load_model(path), tower)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_a_level_more_in_the_names_is_taken_off(tmp_path: Path, name: str) -> None:
    tower = tower_of(name)
    state = {f"vision_model.{key}": value for key, value in tower.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    check(load_model(save_pt(tmp_path / "m.pt", name, state)), tower)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_a_directory_with_texts_the_vision_tower_is_taken(tmp_path: Path, family: str) -> None:
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "clip":
        # The tower's own width of the projection is wrong on purpose, as in published models.
        both: Any = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=text, vision_config={**WIDE, "projection_dim": 512}, projection_dim=16
        ))  # fmt: skip
    else:
        both = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text, vision_config=WIDE)
        )
    both.eval().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.family == f"{family}_vision_model"
    clips = model.example(1)
    with torch.no_grad():
        expected = both.get_image_features(clips[0]).pooler_output
    assert torch.allclose(model(clips)[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_positions_are_fitted_once_to_the_crop_of_the_processor(tmp_path: Path, name: str) -> None:
    tower: Any = tower_of(name, image_size=56)
    tower.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 32, "width": 32}, "do_center_crop": True})
    )
    model = load_model(str(tmp_path))
    assert model.token_grid is not None
    assert (model.clip.height, model.token_grid.height, model.token_grid.width) == (32, 4, 4)
    # The rest of the normalisation is the usual one.
    assert model.clip.mean == (0.485, 0.456, 0.406)
    assert model.config["image_size"] == 32
    positions = model.module.get_submodule("tower.embeddings").position_embeddings
    assert isinstance(positions, torch.Tensor)
    assert positions.shape == (1, 17, 32)
    clips = model.example(1)
    assert torch.allclose(model(clips), embeddings(tower, clips), atol=1e-6)


def test_the_grid_follows_clips_that_were_resized(tmp_path: Path) -> None:
    path = save_pt(tmp_path / "m.pt", "Dinov2Model", dict(tower_of("Dinov2Model").state_dict()))
    model = load_model(path, LoadOptions(input_spec="NTCHW:float32:1x5x3x48x40"))
    grid = model.token_grid
    assert grid is not None
    assert (grid.frames, grid.height, grid.width) == (5, 6, 5)
    assert model(model.example(2)).shape == (2, 5, 32)


def test_what_is_no_tower_is_refused(tmp_path: Path) -> None:
    classifier = transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**COMMON, mlp_ratio=2)
    )
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match="must hold a Dinov2Model, got a Dinov2ForImageClass"):
        load_model(str(tmp_path / "classifier"))
    headless: Any = tower_of("SiglipVisionModel", vision_use_head=False)
    headless.save_pretrained(tmp_path / "headless")
    path = save_pt(
        tmp_path / "m.pt", "SiglipVisionModel", dict(headless.state_dict()), vision_use_head=False
    )
    for source in (str(tmp_path / "headless"), path):
        with pytest.raises(InputError, match="vision_use_head of a siglip_vision_model must be"):
            load_model(source)


def test_weights_that_a_directory_lacks_are_not_made_up(tmp_path: Path) -> None:
    tower: Any = tower_of("Dinov2Model")
    state = {key: value for key, value in tower.state_dict().items() if "layernorm" not in key}
    tower.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks 2 weights of Dinov2Model.*layernorm.bias"):
        load_model(str(tmp_path))
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": [3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vision_config in config.json does not make a CLIPVis"):
        load_model(str(tmp_path))


def test_wrong_weights_are_listed_by_the_names_of_the_user(tmp_path: Path) -> None:
    state = dict(tower_of("CLIPVisionModel").state_dict())
    state["encoder.layers.0.mlp.fc3.weight"] = state.pop("encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(InputError) as error:
        load_model(save_pt(tmp_path / "m.pt", "CLIPVisionModel", state))
    assert "missing encoder.layers.0.mlp.fc1.weight" in str(error.value)
    assert "unexpected encoder.layers.0.mlp.fc3.weight" in str(error.value)
    with pytest.raises(InputError, match=r"clip.num_frames must be an integer.*'eight'"):
        load_model(save_pt(tmp_path / "n.pt", "CLIPVisionModel", state=dict(
            tower_of("CLIPVisionModel").state_dict()), num_frames="eight"))  # fmt: skip
