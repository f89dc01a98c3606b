"""Reduction inside models: exact without any, the same in ONNX, never a stale state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vcompress.compress.tokens.plan import plan_constant, section_of
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import ATTENTIONS, TokenSection, TokenSite

Tiny = Callable[[str], VideoModel]
FAMILIES = ("videomae", "vivit")
# The first would be a NonZero, the others come from data-dependent code or scattered sums.
FORBIDDEN = {"NonZero", "ScatterElements", "ScatterND", "Loop", "If"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_reduction_changes_no_bit(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    planned = model.copy()
    section = section_of(model, [32, 32, 32], "bipartite", "proportional")
    assert apply_reduction(planned, section) is None
    assert torch.equal(planned(model.example(2)), model(model.example(2)))


@pytest.mark.parametrize(
    ("family", "attention"),
    [("videomae", "proportional"), ("vivit", "plain"), ("vivit", "proportional_fused")],
)
def test_reduced_models_export_match_and_build(
    tiny: Tiny, tmp_path: Path, builds_in_tensorrt: Callable[..., None], family: str,
    attention: str,
) -> None:  # fmt: skip
    model = tiny(family)
    planned = model.copy()
    # Below half of the tokens at once: two rounds of matching.
    apply_reduction(planned, section_of(model, [28, 12, 9], "bipartite", attention))
    path = tmp_path / "reduced.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(1, seed=seed)
        expected = planned(clips)
        assert not torch.equal(expected, model(clips))
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    assert not {node.op_type for node in onnx.load(path).graph.node} & FORBIDDEN
    if attention != "plain":
        builds_in_tensorrt(path)


@pytest.mark.parametrize(
    "sites",
    [
        (("static_frames", 40), ("saliency", 24), ("energy", 16), ("drop", 12)),
        (("places", 48), ("frames", 36), ("temporal_sampling", 24), ("grouped", 16)),
    ],
)
def test_other_techniques_in_a_row_export_match_and_build(
    tiny: Callable[..., VideoModel], tmp_path: Path, builds_in_tensorrt: Callable[..., None],
    sites: tuple[tuple[str, int], ...],
) -> None:  # fmt: skip
    model = tiny("vivit", num_frames=8, num_hidden_layers=len(sites))
    blocks = zip(model.token_blocks, sites, strict=True)
    section = TokenSection(
        attention="proportional_fused", num_patches=64,
        sites={name: TokenSite(technique=site[0], keep=site[1]) for name, site in blocks},
    )  # fmt: skip
    planned = model.copy()
    apply_reduction(planned, section)
    path = tmp_path / "reduced.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(1, seed=seed)
        expected = planned(clips)
        assert not torch.equal(expected, model(clips))
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    builds_in_tensorrt(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_proportional_forms_agree(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    clips = model.example(2)
    outputs = {}
    for attention in ATTENTIONS:
        planned = model.copy()
        apply_reduction(planned, section_of(model, [32, 20, 10], "bipartite", attention))
        outputs[attention] = planned(clips)
    assert torch.allclose(outputs["proportional"], outputs["proportional_fused"], atol=1e-6)
    assert not torch.allclose(outputs["plain"], outputs["proportional"], atol=1e-6)


def test_equal_patches_merge_without_loss(tiny: Tiny) -> None:
    model = tiny("videomae")
    # Equal patches at equal positions are equal tokens; only then is the answer known.
    embeddings = model.module.get_submodule("videomae.embeddings")
    embeddings.position_embeddings = torch.zeros_like(embeddings.position_embeddings)
    clips = torch.randn(2, 1, 3, 1, 1).expand(2, *model.clip.input_shape).contiguous()
    for attention in ATTENTIONS:
        planned = model.copy()
        apply_reduction(planned, section_of(model, [32, 18, 10], "bipartite", attention))
        assert torch.allclose(planned(clips), model(clips), atol=1e-5)


def test_sizes_are_conserved_and_patches_are_followed(tiny: Tiny) -> None:
    model = tiny("vivit")
    planned = model.copy()
    state = apply_reduction(planned, section_of(model, [32, 20, 10], "bipartite", "plain"))
    assert state is not None
    state.trace = True
    planned(model.example(2))
    assert state.sizes is not None
    assert state.origin is not None
    assert state.sizes.sum(1).tolist() == [32.0, 32.0]
    counted = torch.stack([torch.bincount(row, minlength=10) for row in state.origin])
    assert torch.equal(counted.float(), state.sizes)


def test_a_state_never_leaks_between_clips(tiny: Tiny) -> None:
    model = tiny("videomae")
    planned = model.copy()
    apply_reduction(planned, plan_constant(model, 0.7, model.example(2)))
    first = planned(model.example(1, seed=1))
    planned(model.example(3, seed=2))
    assert torch.equal(planned(model.example(1, seed=1)), first)


def test_a_copy_of_a_reduced_model_reduces_on_its_own(tiny: Tiny) -> None:
    model = tiny("videomae")
    planned = model.copy()
    apply_reduction(planned, plan_constant(model, 0.7, model.example(2)))
    copied = planned.copy()
    for _ in range(2):
        assert torch.equal(copied(model.example(1, seed=3)), planned(model.example(1, seed=3)))


def test_everything_that_does_not_fit_is_said_at_once(tiny: Tiny) -> None:
    model = tiny("videomae")
    block = model.blocks[1]
    section = TokenSection(
        attention="plain", num_patches=31,
        sites={
            block: TokenSite(technique="bipartite", keep=33),
            "classifier": TokenSite(technique="bipartite", keep=3),
        },
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        apply_reduction(model, section)
    for text in ("num_patches must be 32", "sites.classifier", f"{block}.keep must be at most 31"):
        assert text in str(error.value)
    wrong = replace(section, num_patches=32, sites={block: TokenSite(technique="bipartit", keep=8)})
    with pytest.raises(InputError, match=r"unknown technique 'bipartit'.*bipartite"):
        apply_reduction(model, wrong)


def test_a_model_without_a_grid_says_why() -> None:
    model = wrap_module(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 4 * 4, 5)), name="plain",
        options=LoadOptions(input_spec="NCTHW:float32:1x3x2x4x4"),
    )  # fmt: skip
    with pytest.raises(InputError, match="token grid of family 'generic' is not known"):
        plan_constant(model, 0.5, model.example())
