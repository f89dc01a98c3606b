"""V-JEPA 2: positions are carried as centroids, and the pooler weighs by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.plan import section_of
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.token_section import ATTENTIONS

FORBIDDEN = {"NonZero", "ScatterElements", "ScatterND", "Loop", "If"}
CONFIG: dict[str, Any] = {
    "patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "tubelet_size": 2, "hidden_size": 48,
    "num_attention_heads": 4, "num_hidden_layers": 3, "mlp_ratio": 2, "num_pooler_layers": 2,
    "pred_hidden_size": 48, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1,
    "num_labels": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VideoModel:
    """Three blocks that see 32 patches, 2 x 4 x 4."""
    torch.manual_seed(0)
    adapter = next(adapter for adapter in load.ADAPTERS if adapter.family == "vjepa2")
    module = adapter.build(CONFIG)
    for parameter in module.parameters():
        # Large weights let attention tell tokens apart, and so sizes and positions matter.
        nn.init.normal_(parameter, std=0.15)
    checkpoint = load.checkpoints.Checkpoint(
        family="vjepa2", config=CONFIG, state_dict=module.state_dict()
    )
    return load.from_checkpoint(checkpoint, name="v", source="v", options=LoadOptions())


def reduced(
    model: VideoModel, counts: list[int], attention: str = "proportional"
) -> tuple[VideoModel, TokenState]:
    planned = model.copy()
    state = apply_reduction(planned, section_of(model, counts, "bipartite", attention))
    assert state is not None
    return planned, state


def striped(model: VideoModel, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """A clip of random patches, of which the given pairs (by place in the raster) are equal."""
    generator = torch.Generator().manual_seed(5)
    # frame, row, column, then what stands in a patch: tubelet, channel, height, width
    patches = torch.randn(32, 2, 3, 8, 8, generator=generator)
    for one, other in pairs:
        patches[other] = patches[one]
    raster = patches.reshape(2, 4, 4, 2, 3, 8, 8).permute(0, 3, 4, 1, 5, 2, 6)
    return raster.reshape(1, *model.clip.input_shape)


def test_keeping_all_changes_no_bit(model: VideoModel) -> None:
    planned = model.copy()
    assert apply_reduction(planned, section_of(model, [32, 32, 32], "bipartite", "plain")) is None
    assert torch.equal(planned(model.example(2)), model(model.example(2)))


def test_a_merged_pair_stands_between_its_members(model: VideoModel) -> None:
    # Place 6 is (0, 1, 2), place 27 is (1, 2, 3); the next closest patches are random.
    planned, state = reduced(model, [31, 31, 31])
    planned(striped(model, [(6, 27)]))
    assert state.first_positions is not None
    assert state.first_positions[0, 6].tolist() == [0, 1, 2]
    assert state.first_positions[0, 27].tolist() == [1, 2, 3]
    assert state.positions is not None
    assert state.sizes is not None
    assert state.sizes[0].tolist().count(2.0) == 1
    assert state.positions[0, state.sizes[0].argmax()].tolist() == [0.5, 1.5, 2.5]
    # All the others stand where they stood.
    left = {tuple(row) for row in state.positions[0].tolist()} - {(0.5, 1.5, 2.5)}
    raster = {(t, h, w) for t in range(2) for h in range(4) for w in range(4)}
    assert left == raster - {(0, 1, 2), (1, 2, 3)}


def test_positions_are_weighted_by_size(model: VideoModel) -> None:
    planned, state = reduced(model, [30, 20, 10])
    state.trace = True
    planned(model.example(2))
    assert state.first_positions is not None
    assert state.positions is not None
    assert state.origin is not None
    for row in range(2):
        for token in range(10):
            members = state.first_positions[0][state.origin[row] == token]
            assert torch.allclose(members.mean(0), state.positions[row, token], atol=1e-5)


def test_queries_and_keys_turn_by_the_carried_positions(model: VideoModel) -> None:
    planned, state = reduced(model, [31, 31, 31])
    seen: list[torch.Tensor] = []
    attention: Any = planned.layer("vjepa2.encoder.layer.2.attention")
    attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    kept: list[Any] = []
    attention.register_forward_hook(lambda *_: kept.append(state.inputs))
    planned(striped(model, [(6, 27)]))
    assert state.positions is not None
    with torch.no_grad():
        key = attention.key(seen[0]).view(1, 31, 4, 12).transpose(1, 2)
    # A third of each head (12 channels) for frame, row and column.
    turned = [
        rotate_queries_or_keys(key[..., 4 * axis : 4 * axis + 4], state.positions[:, None, :, axis])
        for axis in range(3)
    ]
    assert torch.allclose(kept[0].key, torch.cat(turned, -1), atol=1e-6)


def test_blocks_in_front_of_the_first_reduction_do_not_change_by_a_bit(model: VideoModel) -> None:
    planned, _ = reduced(model, [32, 32, 16])
    outputs: dict[str, torch.Tensor] = {}
    for name, subject in (("before", model), ("after", planned)):
        handle = subject.layer("vjepa2.encoder.layer.1").register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.update({name: output[0]})
        )
        subject(model.example(2))
        handle.remove()
    assert torch.equal(outputs["before"], outputs["after"])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_equal_patches_merge_without_loss(model: VideoModel, attention: str) -> None:
    # Positions turn queries and keys only: among equal values, attention has nothing to choose.
    clips = torch.randn(2, 1, 3, 1, 1).expand(2, *model.clip.input_shape).contiguous()
    planned, state = reduced(model, [32, 18, 10], attention)
    assert torch.allclose(planned(clips), model(clips), atol=1e-5)
    assert state.sizes is not None
    assert state.sizes.sum(1).tolist() == [32.0, 32.0]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_pooler_takes_a_token_as_often_as_its_size(model: VideoModel, attention: str) -> None:
    planned, state = reduced(model, [32, 20, 10], attention)
    planned(model.example(1))
    assert state.sizes is not None
    # As if nothing had been merged but copied: the pooler has no positions.
    tokens = torch.randn(1, 10, 48, generator=torch.Generator().manual_seed(1))
    copies = tokens.repeat_interleave(state.sizes[0].long(), dim=1)
    with torch.inference_mode():
        expected = model.layer("pooler")(copies)
        assert torch.allclose(planned.layer("pooler")(tokens), expected, atol=1e-5)
        # The test can fail: without sizes, the answer is another one.
        assert not torch.allclose(model.layer("pooler")(tokens), expected, atol=1e-3)


def test_both_proportional_forms_agree(model: VideoModel) -> None:
    clips = model.example(2)
    outputs = {name: reduced(model, [32, 20, 10], name)[0](clips) for name in ATTENTIONS}
    assert torch.allclose(outputs["proportional"], outputs["proportional_fused"], atol=1e-5)
    assert not torch.allclose(outputs["plain"], outputs["proportional"], atol=1e-4)


def test_copies_with_other_schedules_do_not_disturb_each_other(model: VideoModel) -> None:
    clips = model.example(2)
    first, _ = reduced(model, [32, 20, 10])
    before, unreduced = first(clips), model(clips)
    second, state = reduced(model, [16, 16, 8])
    copied = first.copy()
    second(clips)
    assert torch.equal(first(clips), before)
    assert torch.equal(copied(clips), before)
    assert torch.equal(model(clips), unreduced)
    assert state.positions is not None
    assert state.positions.shape == (2, 8, 3)


def test_it_exports_matches_and_builds(
    model: VideoModel, tmp_path: Path, builds_in_tensorrt: Callable[..., None]
) -> None:
    # Tracing takes long: the form with the most operations stands for the others.
    # A reduction in front of the first block, and one to less than half.
    planned, _ = reduced(model, [28, 12, 9], "proportional_fused")
    path = tmp_path / "reduced.onnx"
    facts = export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    assert facts.static_reason is None
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(1, seed=seed)
        expected = planned(clips)
        assert not torch.allclose(expected, model(clips), atol=1e-4)
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    assert not {node.op_type for node in onnx.load(path).graph.node} & FORBIDDEN
    builds_in_tensorrt(path)
