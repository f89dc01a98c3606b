"""TimeSformer and VideoPrism: the same places go in every frame, everything else stays true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import vcompress
from vcompress.calib.clips import Clips
from vcompress.compress.frozen import FrozenLayer
from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.families import FAMILIES
from vcompress.compress.tokens.flops import ScheduleCost
from vcompress.compress.tokens.plan import default_technique, plan_constant, section_of
from vcompress.compress.tokens.rules import objection_to
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import ATTENTIONS

FRAMES, PLACES = 3, 16
SHARED: dict[str, Any] = {
    "image_size": 16, "num_frames": FRAMES, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
TIMESFORMER = SHARED | {"patch_size": 4, "num_hidden_layers": 3}
VIDEOPRISM = SHARED | {
    "tubelet_size": [1, 4, 4], "num_spatial_layers": 3, "num_temporal_layers": 2,
    "num_auxiliary_layers": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "divided": ("timesformer", TIMESFORMER),
    "joint": ("timesformer", TIMESFORMER | {"attention_type": "joint_space_time"}),
    "recogniser": ("videoprism_vision_model", VIDEOPRISM),
    "embedder": (
        "videoprism_vision_model", VIDEOPRISM | {"architectures": ["VideoPrismVideoModel"]}
    ),
}  # fmt: skip
STRUCTURED = ("divided", "recogniser", "embedder")
FORBIDDEN = {"NonZero", "ScatterElements", "ScatterND", "Loop", "If"}


def build(kind: str) -> VideoModel:
    family, config = KINDS[kind]
    (adapter,) = [adapter for adapter in load.ADAPTERS if adapter.family == family]
    generator = torch.Generator().manual_seed(0)
    # Untrained embeddings of time and class are zero, which would hide that they were mixed up.
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter.build(config).state_dict().items()
    }
    checkpoint = load.checkpoints.Checkpoint(family=family, config=config, state_dict=state)
    return load.from_checkpoint(checkpoint, name=kind, source=kind, options=LoadOptions())


def reduced(
    model: VideoModel, places: tuple[int, ...], attention: str = "proportional"
) -> tuple[VideoModel, TokenState]:
    """A copy whose blocks see that many places."""
    planned = model.copy()
    counts = [count * FRAMES for count in places]
    state = apply_reduction(planned, section_of(model, counts, default_technique(model), attention))
    assert state is not None
    return planned, state


def paired_clips(model: VideoModel) -> torch.Tensor:
    """Clips whose patches are equal in horizontal pairs."""
    generator = torch.Generator().manual_seed(5)
    columns = torch.randn(2, FRAMES, 3, 16, 2, 1, 4, generator=generator)
    return columns.expand(-1, -1, -1, -1, -1, 2, -1).reshape(2, *model.clip.input_shape)


def forget_places(model: VideoModel) -> None:
    """Give every place the same position embedding: equal patches become equal tokens."""
    for name, parameter in model.module.named_parameters():
        if name.endswith("embeddings.position_embeddings") and "temporal" not in name:
            parameter.zero_()


@pytest.mark.parametrize("kind", ["divided", "joint"])
def test_the_written_block_is_the_block(kind: str) -> None:
    model = build(kind)
    written = model.copy()
    assert written.token_grid is not None
    prepare = FAMILIES["timesformer"].prepare
    assert prepare is not None
    prepare(written, TokenState(layout=Layout(written.token_grid), attention="proportional"))
    assert type(written.layer(model.blocks[0])) is not type(model.layer(model.blocks[0]))
    clips = model.example(2)
    assert torch.allclose(written(clips), model(clips), atol=1e-5)
    assert written.module.state_dict().keys() == model.module.state_dict().keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_places_change_no_bit(kind: str) -> None:
    model = build(kind)
    planned = model.copy()
    counts = [FRAMES * PLACES] * 3
    section = section_of(model, counts, default_technique(model), "proportional")
    assert apply_reduction(planned, section) is None
    assert torch.equal(planned(model.example(2)), model(model.example(2)))


@pytest.mark.parametrize("kind", STRUCTURED)
def test_the_same_places_go_in_every_frame(kind: str) -> None:
    model = build(kind)
    planned, state = reduced(model, (16, 11, 6))
    state.trace = True
    clips = model.example(2)
    output = planned(clips)
    assert state.sizes is not None
    assert state.origin is not None
    sizes = state.sizes.reshape(2, FRAMES, 6)
    assert torch.equal(sizes, sizes[:, :1].expand_as(sizes))
    assert sizes.sum(-1).tolist() == [[PLACES] * FRAMES] * 2
    origin = state.origin.reshape(2, FRAMES, PLACES)
    first = torch.arange(FRAMES)[None, :, None] * 6
    assert torch.equal(origin - first, origin[:, :1].expand_as(origin))
    # Clips of a batch do not see each other.
    assert torch.allclose(output[1:], planned(clips[1:]), atol=1e-5)
    assert not torch.allclose(output, model(clips), atol=1e-4)


@pytest.mark.parametrize("kind", STRUCTURED)
def test_equal_places_merge_without_loss(kind: str) -> None:
    model = build(kind)
    forget_places(model)
    clips = paired_clips(model)
    expected = model(clips)
    # Only some of the pairs merge, so that sizes differ; a second matching would not find them all.
    for attention in ("proportional", "proportional_fused"):
        planned, state = reduced(model, (16, 12, 12), attention)
        assert torch.allclose(planned(clips), expected, atol=1e-5)
        assert state.sizes is not None
        assert set(state.sizes.flatten().tolist()) == {1.0, 2.0}
    planned, _ = reduced(model, (16, 12, 12), "plain")
    assert not torch.allclose(planned(clips), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["recogniser", "embedder"])
def test_what_reads_the_tokens_weighs_them_whatever_the_blocks_do(kind: str) -> None:
    model = build(kind)
    forget_places(model)
    for name in model.token_blocks:
        # Without an attention in the way, merged tokens are as if they had never been apart.
        model.layer(f"{name}.attention.o_proj").requires_grad_(False).weight.zero_()
    clips = paired_clips(model)
    planned, _ = reduced(model, (16, 16, 11), "plain")
    assert torch.allclose(planned(clips), model(clips), atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_forms_of_proportional_attention_agree(kind: str) -> None:
    model = build(kind)
    clips = model.example(2)
    outputs = {name: reduced(model, (16, 10, 5), name)[0](clips) for name in ATTENTIONS}
    assert torch.allclose(outputs["proportional"], outputs["proportional_fused"], atol=1e-6)
    assert not torch.allclose(outputs["plain"], outputs["proportional"], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("divided", "proportional_fused"), ("joint", "plain"), ("recogniser", "proportional")],
)
def test_reduced_models_export_match_and_build(
    tmp_path: Path, builds_in_tensorrt: Callable[..., None], kind: str, attention: str
) -> None:
    model = build(kind)
    # Below half of the places at once: two rounds of matching.
    planned, _ = reduced(model, (14, 6, 5), attention)
    path = tmp_path / "reduced.onnx"
    facts = export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    assert facts.input_shape[0] == "batch", facts.static_reason
    session = open_session(path)
    for batch, seed in ((1, 1), (2, 2)):
        clips = model.example(batch, seed=seed)
        expected = planned(clips)
        assert not torch.allclose(expected, model(clips), atol=1e-4)
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    assert not {node.op_type for node in onnx.load(path).graph.node} & FORBIDDEN
    builds_in_tensorrt(path)


@pytest.mark.parametrize("kind", list(KINDS))
def test_copies_and_clips_do_not_meet(kind: str) -> None:
    model = build(kind)
    planned, _ = reduced(model, (16, 10, 5))
    copied = planned.copy()
    first, second = model.example(1, seed=1), model.example(3, seed=2)
    expected = planned(first)
    planned(second)
    assert torch.equal(copied(first), expected)
    copied(second)
    assert torch.equal(planned(first), expected)


@pytest.mark.parametrize("kind", STRUCTURED)
@pytest.mark.parametrize("technique", ["bipartite", "frames", "drop"])
def test_what_would_tear_places_apart_is_refused(kind: str, technique: str) -> None:
    model = build(kind)
    assert default_technique(model) == "places"
    assert "every frame has to keep the same places" in str(objection_to(model, technique))
    section = section_of(model, [48, 30, 15], technique, "plain")
    with pytest.raises(InputError, match="every frame has to keep the same places"):
        apply_reduction(model, section)
    uneven = section_of(model, [48, 31, 15], "places", "plain")
    with pytest.raises(InputError, match="must be a multiple of 3, got 31"):
        apply_reduction(model, uneven)


def test_joint_tokens_are_put_into_raster_order() -> None:
    model = build("joint")
    planned, state = reduced(model, (16, 10, 5))
    state.trace = True
    seen: list[torch.Tensor] = []
    first = planned.layer(model.blocks[0])
    first.register_forward_pre_hook(lambda _block, inputs: seen.append(inputs[0]))
    clips = model.example(1)
    planned(clips)
    embeddings = model.layer("timesformer.embeddings")
    with torch.inference_mode():
        places_first = embeddings(clips)[:, 1:].reshape(1, PLACES, FRAMES, -1)
    assert torch.equal(seen[0][:, 1:], places_first.transpose(1, 2).flatten(1, 2))
    assert state.sizes is not None
    assert state.sizes.sum(1).tolist() == [48.0]


def test_a_reduced_timesformer_is_quantized() -> None:
    model = build("divided")
    generator = np.random.default_rng(0)
    array = generator.normal(size=(8, *model.clip.input_shape)).astype("f4")
    clips = Clips.from_array(array, model.clip)
    options = vcompress.Options(target="int8", tokens=0.7)
    plan, tensors = make_plan(model, clips, options)
    assert plan.tokens is not None
    assert {site.technique for site in plan.tokens.sites.values()} == {"places"}
    planned = apply_plan(model, plan, tensors)
    frozen = {
        name for name, layer in planned.module.named_modules() if isinstance(layer, FrozenLayer)
    }
    # The names of layers inside the written blocks are those of the plan.
    assert frozen == {name for name, choice in plan.quantize.items() if choice.format != "keep"}
    assert "timesformer.encoder.layer.1.temporal_attention.attention.qkv" in frozen
    batch = torch.from_numpy(array)
    tokens_alone = model.copy()
    apply_reduction(tokens_alone, plan.tokens)
    expected, output = tokens_alone(batch), planned(batch)
    error = torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected)
    assert 0 < error < 0.1


def test_blocks_behind_the_spatial_tower_are_paid_for() -> None:
    cost = ScheduleCost.of(build("embedder"))
    # Query, key, value and output of 32 x 32 and an MLP of 32 x 64 and back.
    weights = 4 * 32 * 32 + 2 * 32 * 64
    patches = 5 * FRAMES
    spatial = 2 * weights * patches + FRAMES * 4 * 32 * 5**2
    temporal = 2 * weights * patches + 4 * 32 * patches * FRAMES
    auxiliary = 2 * weights * patches + 4 * 32 * patches**2
    total = cost.rest + 3 * spatial + 2 * temporal + 2 * auxiliary
    assert cost.total([patches] * 3) == total


@pytest.mark.parametrize("kind", STRUCTURED)
def test_controls_exist_for_places(kind: str) -> None:
    model = build(kind)
    clips = model.example(2)
    for technique in ("drop_places", "random_places"):
        assert objection_to(model, technique) is None
        planned = model.copy()
        state = apply_reduction(planned, section_of(model, [48, 30, 15], technique, "plain"))
        assert state is not None
        state.trace = True
        assert not torch.allclose(planned(clips), model(clips), atol=1e-4)
        assert state.origin is not None
        gone = (state.origin < 0).reshape(2, FRAMES, PLACES)
        assert torch.equal(gone, gone[:, :1].expand_as(gone))
        assert gone.any() == (technique == "drop_places")


def test_a_share_of_places_is_planned() -> None:
    model = build("recogniser")
    section = plan_constant(model, 0.7, model.example(2))
    counts = [section.sites[name].keep for name in model.token_blocks if name in section.sites]
    # 16, 11 and 6 places are 0.69 of 16 on average.
    assert counts == [11 * FRAMES, 6 * FRAMES]
