"""Frame towers: frames are reduced each for itself, special tokens stay, pooling weighs by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vcompress.compress.frozen import freeze
from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.plan import section_of
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import ATTENTIONS, TokenSection, TokenSite

FORBIDDEN = {"NonZero", "ScatterElements", "ScatterND", "Loop", "If"}
FAMILIES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
CONFIG: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_frames": 2,
}  # fmt: skip


def tower(family: str) -> VideoModel:
    """Three blocks that see 2 frames of 16 patches."""
    torch.manual_seed(0)
    adapter = next(adapter for adapter in load.ADAPTERS if adapter.family == family)
    config = {**CONFIG, **({"mlp_ratio": 2} if "dino" in family else {"intermediate_size": 64})}
    module = adapter.build(config)
    for parameter in module.parameters():
        # Large weights let attention tell tokens apart, and so sizes matter.
        nn.init.normal_(parameter, std=0.2)
    checkpoint = load.checkpoints.Checkpoint(
        family=family, config=config, state_dict=module.state_dict()
    )
    return load.from_checkpoint(checkpoint, name=family, source=family, options=LoadOptions())


def without_positions(model: VideoModel) -> VideoModel:
    """The same whose patches do not know where they stand: equal patches are equal tokens."""
    model = model.copy()
    for name, parameter in model.module.named_parameters():
        if "position_embedding" in name:
            nn.init.zeros_(parameter)
    return model


def reduced(
    model: VideoModel, counts: list[int], attention: str = "proportional"
) -> tuple[VideoModel, TokenState]:
    planned = model.copy()
    state = apply_reduction(planned, section_of(model, counts, "bipartite", attention))
    assert state is not None
    return planned, state


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_no_bit(family: str) -> None:
    model = tower(family)
    planned = model.copy()
    section = section_of(model, [32, 32, 32], "bipartite", "proportional")
    assert apply_reduction(planned, section) is None
    assert torch.equal(planned(model.example(2)), model(model.example(2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_frame_keeps_its_patches_and_its_special_tokens(family: str) -> None:
    model = tower(family)
    grid = model.token_grid
    assert grid is not None
    planned, state = reduced(model, [24, 24, 8])
    clips, seen = model.example(2), list[torch.Tensor]()
    for subject in (model, planned):
        norm = "layer_norm1" if "clip" in family or "siglip" in family else "norm1"
        subject.layer(f"{model.blocks[0]}.{norm}").register_forward_pre_hook(
            lambda _module, inputs: seen.append(inputs[0])
        )
        subject(clips)
    whole, left = seen
    assert whole.shape == (4, grid.special + 16, 32)
    assert left.shape == (4, grid.special + 12, 32)
    assert torch.equal(whole[:, : grid.special], left[:, : grid.special])
    assert state.sizes is not None
    assert state.sizes.shape == (4, 4)
    assert state.sizes.sum(1).tolist() == [16.0] * 4
    # A frame's embedding is the same whatever the other frames show.
    others = clips.clone()
    others[:, 1] = torch.randn(2, 3, 32, 32)
    assert torch.allclose(planned(clips)[:, 0], planned(others)[:, 0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["proportional", "proportional_fused"])
def test_equal_patches_merge_without_loss(family: str, attention: str) -> None:
    # Two kinds of patches, 12 and 4 in every frame: who forgets sizes takes them for half and half.
    model = without_positions(tower(family))
    kinds = torch.zeros(4, 4).index_fill(0, torch.tensor([2]), 1.0)
    pixels = kinds.repeat_interleave(8, 0).repeat_interleave(8, 1)
    clips = torch.randn(2, 2, 3, 1, 1) + torch.randn(2, 2, 3, 1, 1) * pixels
    planned, state = reduced(model, [32, 22, 14], attention)
    assert torch.allclose(planned(clips), model(clips), atol=1e-5)
    assert state.sizes is not None
    assert state.sizes.sum(1).tolist() == [16.0] * 4
    # The test can fail: here some tokens stand for two patches and some for one.
    plain, _ = reduced(model, [32, 22, 14], "plain")
    assert not torch.allclose(plain(clips), model(clips), atol=1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_head_of_siglip_takes_a_token_as_often_as_its_size(attention: str) -> None:
    model = tower("siglip_vision_model")
    planned, state = reduced(model, [32, 24, 12], attention)
    planned(model.example(1))
    assert state.sizes is not None
    tokens = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    copies = torch.stack([
        row.repeat_interleave(sizes.long(), dim=0)
        for row, sizes in zip(tokens, state.sizes, strict=True)
    ])  # fmt: skip
    with torch.inference_mode():
        expected = model.layer("tower.head")(copies)
        assert torch.allclose(planned.layer("tower.head")(tokens), expected, atol=1e-5)
        assert not torch.allclose(model.layer("tower.head")(tokens), expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_proportional_forms_agree(family: str) -> None:
    model = tower(family)
    clips = model.example(2)
    outputs = {name: reduced(model, [32, 20, 10], name)[0](clips) for name in ATTENTIONS}
    assert torch.allclose(outputs["proportional"], outputs["proportional_fused"], atol=1e-5)
    assert not torch.allclose(outputs["plain"], outputs["proportional"], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_with_other_schedules_do_not_disturb_each_other(family: str) -> None:
    model = tower(family)
    clips = model.example(2)
    first, _ = reduced(model, [32, 20, 10])
    before, unreduced = first(clips), model(clips)
    second, state = reduced(model, [16, 16, 8])
    copied = first.copy()
    second(clips)
    assert torch.equal(first(clips), before)
    assert torch.equal(copied(clips), before)
    assert torch.equal(model(clips), unreduced)
    assert state.sizes is not None
    assert state.sizes.shape == (4, 4)


@pytest.mark.parametrize(
    ("family", "attention"), [*zip(FAMILIES, [*ATTENTIONS, "plain"], strict=True)]
)
def test_it_exports_matches_and_builds(
    tmp_path: Path, builds_in_tensorrt: Callable[..., None], family: str, attention: str
) -> None:
    model = tower(family)
    # A reduction in front of the first block, and one to less than half.
    planned, _ = reduced(model, [28, 12, 10], attention)
    path = tmp_path / "reduced.onnx"
    facts = export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    assert facts.static_reason is None
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(seed, seed=seed)
        expected = planned(clips)
        assert not torch.allclose(expected, model(clips), atol=1e-4)
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    assert not {node.op_type for node in onnx.load(path).graph.node} & FORBIDDEN
    builds_in_tensorrt(path)


def test_a_quantized_tower_still_knows_the_type_of_its_weights() -> None:
    # The embedding of patches asks for it before it calls its convolution.
    model = tower("siglip_vision_model")
    planned, _ = reduced(model, [32, 20, 10])
    clips = model.example(2)
    expected = planned(clips)
    embeddings: Any = planned.layer("tower.embeddings")
    amax = float(clips.abs().max())
    embeddings.patch_embedding = freeze(embeddings.patch_embedding, "int8", amax)
    assert embeddings.patch_embedding.weight.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(planned(clips), expected, dim=-1).min() > 0.9


def test_each_frame_merges_its_own_flat_patches() -> None:
    # Ten flat patches in each frame, other ones in every frame and clip.
    model = tower("dinov2_with_registers")
    generator = torch.Generator().manual_seed(0)
    flat = torch.stack([torch.randperm(16, generator=generator)[:10] for _ in range(4)])
    frames = torch.randn(4, 16, 3, 8, 8, generator=generator)
    for frame, places in zip(frames, flat, strict=True):
        frame[places] = torch.randn(10, 3, 1, 1, generator=generator)
    pixels = frames.reshape(2, 2, 4, 4, 3, 8, 8).permute(0, 1, 4, 2, 5, 3, 6)
    planned = model.copy()
    state = apply_reduction(planned, section_of(model, [18, 18, 18], "detail", "proportional"))
    assert state is not None
    state.trace = True
    planned(pixels.reshape(2, *model.clip.input_shape))
    assert state.origin is not None
    assert state.sizes is not None
    # Nine stay: six with detail, and three flat ones that take in the others.
    merged = state.sizes.gather(1, state.origin) > 1
    detailed = torch.ones(4, 16, dtype=torch.bool).scatter(1, flat, False)
    assert not (merged & detailed).any()
    assert (state.sizes > 1).sum(1).max() <= 3


def test_frames_share_the_count() -> None:
    model = tower("dinov2")
    site = {model.blocks[1]: TokenSite(technique="bipartite", keep=17)}
    with pytest.raises(InputError, match="keep must be a multiple of 2, got 17"):
        apply_reduction(model, TokenSection(attention="plain", num_patches=32, sites=site))
