"""TimeSformer and VideoPrism, from a checkpoint and from a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vcompress.models.load import ADAPTERS, load_model
from vcompress.spec.errors import InputError

LABELS = {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}}
SHARED: dict[str, Any] = {
    "image_size": 16, "num_frames": 3, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
TIMESFORMER = SHARED | LABELS | {"patch_size": 4, "num_hidden_layers": 2}
VIDEOPRISM = SHARED | LABELS | {
    "tubelet_size": [1, 4, 4], "num_spatial_layers": 2, "num_temporal_layers": 2,
    "num_auxiliary_layers": 2,
}  # fmt: skip


def save_checkpoint(path: Path, family: str, config: Mapping[str, Any]) -> Path:
    torch.manual_seed(0)
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.family == family]
    state = adapter.build(config).state_dict()
    torch.save({"family": family, "config": dict(config), "state_dict": state}, path)
    return path


def save_directory(path: Path, config_class: str, model_class: str, **config: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    parsed = getattr(transformers, config_class)(**config)
    getattr(transformers, model_class)(parsed).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("attention", "arrangement"), [("divided_space_time", "divided"), ("joint_space_time", "joint")]
)
def test_a_timesformer_is_described(tmp_path: Path, attention: str, arrangement: str) -> None:
    config = TIMESFORMER | {"attention_type": attention}
    path = save_checkpoint(tmp_path / "m.pt", "timesformer", config)
    model = load_model(str(path))
    grid = model.token_grid
    assert grid is not None
    assert (grid.frames, grid.height, grid.width, grid.special) == (3, 4, 4, 1)
    assert grid.arrangement == arrangement
    assert model.token_blocks == model.blocks
    assert model.blocks == ("timesformer.encoder.layer.0", "timesformer.encoder.layer.1")
    assert model.pooling == "class_token"
    assert model.labels == ("a", "b", "c", "d", "e")
    assert (model.clip.mean, model.clip.std) == ((0.45,), (0.225,))
    assert model(model.example(2)).shape == (2, 5)
    folder = save_directory(
        tmp_path / "m", "TimesformerConfig", "TimesformerForVideoClassification", **config
    )
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    saved = load_model(str(folder))
    assert saved.weights_sha256 == model.weights_sha256
    assert torch.allclose(saved(model.example(2)), model(model.example(2)), atol=1e-6)
    assert saved.token_grid == grid
    assert (saved.clip.mean, saved.clip.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


def test_what_is_no_recogniser_of_clips_is_refused(tmp_path: Path) -> None:
    config = TIMESFORMER | {"attention_type": "space_only"}
    path = save_checkpoint(tmp_path / "m.pt", "timesformer", config)
    with pytest.raises(InputError, match="space_only gives one output for each frame"):
        load_model(str(path))
    folder = save_directory(tmp_path / "m", "TimesformerConfig", "TimesformerModel", **TIMESFORMER)
    with pytest.raises(InputError, match="got a TimesformerModel, which has no head"):
        load_model(str(folder))


def test_a_videoprism_recogniser_is_described(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m.pt", "videoprism_vision_model", VIDEOPRISM)
    model = load_model(str(path))
    grid = model.token_grid
    assert grid is not None
    assert (grid.frames, grid.height, grid.width, grid.special) == (3, 4, 4, 0)
    assert (grid.arrangement, grid.readers) == ("tubes", ("head",))
    spatial = ("vision_model.spatial_layers.0", "vision_model.spatial_layers.1")
    temporal = ("vision_model.temporal_layers.0", "vision_model.temporal_layers.1")
    assert model.token_blocks == spatial
    assert model.blocks == spatial + temporal
    assert (model.task, model.pooling) == ("classify", "attention")
    assert model.labels == ("a", "b", "c", "d", "e")
    assert (model.clip.mean, model.clip.std) == ((0.0,), (1.0,))
    # The library leaves an axis for its one query.
    assert model(model.example(2)).shape == (2, 5)
    assert model.module.state_dict().keys() == torch.load(path)["state_dict"].keys()
    folder = save_directory(
        tmp_path / "m", "VideoPrismVisionConfig", "VideoPrismForVideoClassification", **VIDEOPRISM
    )
    saved = load_model(str(folder))
    assert saved.weights_sha256 == model.weights_sha256
    assert torch.allclose(saved(model.example(2)), model(model.example(2)), atol=1e-6)
    assert saved.token_grid == grid


def test_a_videoprism_encoder_gives_its_embedding(tmp_path: Path) -> None:
    folder = save_directory(
        tmp_path / "m", "VideoPrismVisionConfig", "VideoPrismVideoModel", **VIDEOPRISM
    )
    model = load_model(str(folder))
    assert (model.task, model.pooling, model.labels) == ("embed", "attention", ())
    assert model.token_grid is not None
    assert model.token_grid.readers == ("auxiliary_layers", "head")
    embedding = model(model.example(2))
    assert embedding.shape == (2, 32)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2))
    torch.save(
        {
            "family": model.family, "config": dict(model.config),
            "state_dict": model.module.state_dict(),
        },
        tmp_path / "m.pt",
    )  # fmt: skip
    again = load_model(str(tmp_path / "m.pt"))
    assert torch.allclose(again(model.example(2)), embedding, atol=1e-6)
    assert again.token_grid == model.token_grid


def test_the_part_that_sees_is_taken_out_of_a_model_of_videos_and_texts(tmp_path: Path) -> None:
    import transformers

    text = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 9}
    vision = {name: value for name, value in VIDEOPRISM.items() if name != "id2label"}
    config = transformers.VideoPrismConfig(
        vision_config=vision, text_config=text | {"num_hidden_layers": 1}
    )
    whole = transformers.VideoPrismClipModel(config).eval()
    whole.save_pretrained(tmp_path / "m")
    model = load_model(str(tmp_path / "m"))
    assert model.family == "videoprism_vision_model"
    clips = model.example(2)
    with torch.inference_mode():
        expected = whole.get_video_features(clips).pooler_output[:, 0]
    assert torch.allclose(model(clips), expected, atol=1e-6)


def test_a_bare_videoprism_encoder_says_why_it_keeps_its_tokens(tmp_path: Path) -> None:
    from vcompress.compress.tokens.rules import objection

    folder = save_directory(
        tmp_path / "m", "VideoPrismVisionConfig", "VideoPrismVisionModel", **VIDEOPRISM
    )
    model = load_model(str(folder))
    assert model(model.example(2)).shape == (2, 3 * 16, 32)
    assert model.token_blocks == ("spatial_layers.0", "spatial_layers.1")
    assert "pools its tokens is not known" in str(objection(model))


def test_sizes_of_another_clip_are_refused(tmp_path: Path) -> None:
    config = VIDEOPRISM | {"tubelet_size": [3, 4, 4]}
    path = save_checkpoint(tmp_path / "m.pt", "videoprism_vision_model", config)
    with pytest.raises(InputError, match="does not run on an input of shape"):
        load_model(str(path))
