"""What every technique owes, in torch, in ONNX and inside a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.plan import section_of
from vcompress.compress.tokens.reduction import Chain, Reducer
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.compress.tokens.techniques import centroids
from vcompress.compress.tokens.view import AttentionInputs, View
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.errors import InputError

Tiny = Callable[[str], VideoModel]

# 4 frames of 6 places, one special token, 2 heads.
T, L, S, C, HEADS, D = 4, 6, 1, 8, 2, 4
N = T * L
# A source counts in full in the average of its target.
AVERAGING = ("bipartite", "energy", "detail", "places", "frames", "random", "random_places")
# Every token goes to one place; a fitted technique divides it among several.
WHOLE = [name for name, technique in TECHNIQUES.items() if not technique.is_fitted]


def made_view(packed: torch.Tensor) -> View:
    """Everything that a technique may look at, out of one `[B, S + N, C + 2 HEADS D + 1]`."""
    query, key = (
        part.unflatten(2, (HEADS, D)).transpose(1, 2)
        for part in (packed[..., C : C + HEADS * D], packed[..., C + HEADS * D : -1])
    )
    return View(
        tokens=packed[:, S:, :C], sizes=1 + packed[:, S:, 0].abs(), keys=key.mean(1)[:, S:],
        attention=AttentionInputs(query=query, key=key, scale=0.5), num_special=S, num_frames=T,
        pixels={"change": packed[:, S:, -1].abs(), "detail": packed[:, S:, -1].abs()},
    )  # fmt: skip


def random_pack(seed: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, S + N, C + 2 * HEADS * D + 1, generator=generator)


def counts(name: str) -> range:
    """All numbers of tokens that `name` can keep of the raster."""
    technique = TECHNIQUES[name]
    unit = {"lost": 1, "places": T, "frames": L}[technique.raster]
    return range(max(unit, technique.num_whole_frames * L), N, unit)


def seen_by(name: str, view: View, keep: int) -> View:
    """`view` with centres where `name` needs them."""
    return replace(view, centers=fitted(keep)) if TECHNIQUES[name].is_fitted else view


def fitted(keep: int) -> torch.Tensor:
    """`keep` centres of random keys."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(64, D, generator=generator)
    return centroids.fit_centroids(keys, keep, generator) / 0.1


def reducers(name: str, view: View) -> list[Reducer]:
    return [TECHNIQUES[name].reduce(seen_by(name, view, keep), keep) for keep in counts(name)]


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_sizes_are_conserved_or_only_lost(name: str) -> None:
    view = made_view(random_pack(0))
    for keep, reducer in zip(counts(name), reducers(name, view), strict=True):
        merged, sizes = reducer.apply(view.tokens, view.sizes)
        assert merged.shape == (2, keep, C)
        assert sizes.shape == (2, keep)
        total, before = sizes.sum(1), view.sizes.sum(1)
        if TECHNIQUES[name].conserves:
            assert torch.allclose(total, before)
        else:
            assert (total < before).all()
            assert (sizes >= 1).all()


@pytest.mark.parametrize("name", AVERAGING)
def test_the_mean_over_patches_stays(name: str) -> None:
    view = made_view(random_pack(1))

    def mean(tokens: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return (tokens * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)

    for reducer in reducers(name, view):
        merged = reducer.apply(view.tokens, view.sizes)
        assert torch.allclose(mean(*merged), mean(view.tokens, view.sizes), atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_destinations_explain_the_result(name: str) -> None:
    view = made_view(random_pack(2))
    for keep, reducer in zip(counts(name), reducers(name, view), strict=True):
        merged, sizes = reducer.apply(view.tokens, view.sizes)
        went = reducer.destination()
        assert went.shape == (2, N)
        members = torch.nn.functional.one_hot(went.clamp(min=0), keep) * (went >= 0)[..., None]
        assert (members.sum(1) >= 1).all()
        weights = members.transpose(1, 2) * view.sizes[:, None]
        if TECHNIQUES[name].conserves or (went < 0).any():
            assert torch.allclose(weights.sum(-1), sizes)
        if name in AVERAGING:
            averages = weights @ view.tokens / weights.sum(-1, keepdim=True)
            assert torch.allclose(merged, averages, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_constant_groups_come_back_exactly(name: str) -> None:
    view = made_view(random_pack(3))
    for keep, reducer in zip(counts(name), reducers(name, view), strict=True):
        groups = torch.randn(2, keep, 5, generator=torch.Generator().manual_seed(keep))
        spread = reducer.restore(groups)
        merged, sizes = reducer.apply(spread, view.sizes)
        assert torch.allclose(merged, groups, atol=1e-5)
        assert torch.allclose(reducer.restore(merged), spread, atol=1e-5)
        if TECHNIQUES[name].conserves:
            # Which is why pooling by size is exact.
            pooled = (merged * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)
            full = (spread * view.sizes[..., None]).sum(1) / view.sizes.sum(1, keepdim=True)
            assert torch.allclose(pooled, full, atol=1e-5)


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_equal_tokens_lose_nothing(name: str) -> None:
    equal = random_pack(4)[:, :1].expand(-1, S + N, -1)
    view = made_view(equal)
    for reducer in reducers(name, view):
        merged, _ = reducer.apply(view.tokens, view.sizes)
        assert torch.allclose(merged, view.tokens[:, : merged.shape[1]], atol=1e-6)


@pytest.mark.parametrize("name", ["energy", "frames", "temporal_sampling"])
def test_equal_frames_lose_nothing(name: str) -> None:
    frame = random_pack(5)[:, 1 : 1 + L]
    view = made_view(torch.cat([frame[:, :1], frame.repeat(1, T, 1)], dim=1))
    # Half of the frames can go; the first frame is repeated at an odd and at an even time.
    reducer = TECHNIQUES[name].reduce(view, N // 2)
    merged, sizes = reducer.apply(view.tokens, view.sizes)
    assert torch.allclose(reducer.restore(merged), view.tokens, atol=1e-5)
    assert torch.allclose(sizes.sum(1), view.sizes.sum(1))


def test_random_is_worse_than_drop_is_worse_than_merging() -> None:
    # Pairs of nearly equal tokens, side by side, and half as many to keep: a merged pair is wrong
    # by half of its difference twice, a dropped token by all of it once, and its square is more.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 16, 12, generator=generator)
    tokens = torch.stack([base, base + 0.1 * torch.randn(base.shape, generator=generator)], 2)
    view = View(tokens=tokens.flatten(1, 2), sizes=torch.ones(4, 32), keys=tokens.flatten(1, 2))

    def error(name: str) -> float:
        reducer = TECHNIQUES[name].reduce(view, 16)
        merged, _ = reducer.apply(view.tokens, view.sizes)
        return float((reducer.restore(merged) - view.tokens).pow(2).sum())

    assert error("drop") == pytest.approx(2 * error("bipartite"), rel=1e-3)
    assert error("random") > 10 * error("drop")


def test_two_techniques_in_a_row_are_one() -> None:
    view = made_view(random_pack(6))
    first = TECHNIQUES["places"].reduce(view, 16)
    tokens, sizes = first.apply(view.tokens, view.sizes)
    keys, _ = first.apply(view.keys, view.sizes)
    second = TECHNIQUES["frames"].reduce(
        View(tokens=tokens, sizes=sizes, keys=keys, num_frames=T), 12
    )
    chain = Chain((first, second))
    merged, grown = chain.apply(view.tokens, view.sizes)
    members = torch.nn.functional.one_hot(chain.destination(), 12).transpose(1, 2)
    weights = members * view.sizes[:, None]
    assert torch.allclose(grown, weights.sum(-1))
    averages = weights @ view.tokens / weights.sum(-1, keepdim=True)
    assert torch.allclose(merged, averages, atol=1e-5)
    assert torch.allclose(chain.restore(merged), averages.gather(
        1, chain.destination()[..., None].expand(-1, -1, C)
    ), atol=1e-5)  # fmt: skip


class Packed(nn.Module):
    """A technique over all that it may look at, its result in one tensor."""

    def __init__(self, reduce: Callable[[View], Reducer], restores: bool) -> None:
        super().__init__()
        self.reduce, self.restores = reduce, restores

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        view = made_view(packed)
        reducer = self.reduce(view)
        merged, sizes = reducer.apply(view.tokens, view.sizes)
        if self.restores:
            return reducer.restore(merged)
        return torch.cat([merged, sizes[..., None]], dim=-1)


def exported_operators(module: nn.Module, path: Path) -> set[str]:
    """Operators of `module` in ONNX, after the file was compared with torch on two inputs."""
    facts = export_onnx(module, random_pack(0), path, dialect="portable")
    assert facts.opset >= 20
    assert facts.static_reason is None
    session = open_session(path)
    for seed, batch in ((1, 1), (2, 3)):
        packed = random_pack(seed, batch)
        assert np.allclose(session.run(packed.numpy()), module(packed).numpy(), atol=1e-5)
    graph = onnx.load(path).graph
    for node in graph.node:
        reductions = [field.s for field in node.attribute if field.name == "reduction"]
        assert not node.op_type.startswith("Scatter") or reductions in ([], [b"none"])
    return {node.op_type for node in graph.node}


FORBIDDEN = {"NonZero", "ScatterElements", "ScatterND", "Loop", "If", "Scan", "RandomNormal"}


# Below half of the tokens where a technique takes several rounds for it.
@pytest.mark.parametrize(
    ("name", "keep"), [*((name, 12) for name in TECHNIQUES), ("saliency", 5), ("grouped", 10)]
)
def test_every_technique_exports(tmp_path: Path, name: str, keep: int) -> None:
    technique = TECHNIQUES[name]
    centers = fitted(keep) if technique.is_fitted else None
    module = Packed(
        lambda view: technique.reduce(replace(view, centers=centers), keep), restores=False
    )
    operators = exported_operators(module, tmp_path / "technique.onnx")
    assert not operators & FORBIDDEN
    if name == "centroids":
        assert not operators & {"TopK", "GatherND", "GatherElements"}


class Everything(nn.Module):
    """All techniques on the same tokens, side by side, so that one engine holds them all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", fitted(12))

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        view, results = made_view(packed), []
        for technique in TECHNIQUES.values():
            centers = self.centers if technique.is_fitted else None
            reducer = technique.reduce(replace(view, centers=centers), 12)
            merged, sizes = reducer.apply(view.tokens, view.sizes)
            results += [merged, sizes[..., None].expand_as(merged)]
        return torch.cat(results, dim=1)


def test_every_technique_builds(tmp_path: Path, builds_in_tensorrt: Callable[..., None]) -> None:
    path = tmp_path / "everything.onnx"
    export_onnx(Everything(), random_pack(0), path, dialect="portable")
    builds_in_tensorrt(path)


@pytest.mark.parametrize(("name", "keep"), [("bipartite", 5), ("places", 8), ("frames", 12)])
def test_the_way_back_exports(tmp_path: Path, name: str, keep: int) -> None:
    module = Packed(lambda view: TECHNIQUES[name].reduce(view, keep), restores=True)
    assert not exported_operators(module, tmp_path / "restored.onnx") & {"NonZero", "Loop", "If"}


def test_a_still_clip_loses_nothing_in_a_model(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("videomae")
    # Positions in time are the only difference between the frames of a still clip.
    embeddings = model.module.get_submodule("videomae.embeddings")
    first = embeddings.position_embeddings[:, :16]
    embeddings.position_embeddings = torch.cat([first, first], dim=1)
    planned = model.copy()
    assert apply_reduction(
        planned, section_of(model, [20, 20, 20], "static_frames", "proportional")
    )
    still = model.example(2)[:, :1].expand(2, *model.clip.input_shape).contiguous()
    assert torch.allclose(planned(still), model(still), atol=1e-5)
    moving = model.example(2, seed=1)
    assert not torch.allclose(planned(moving), model(moving), atol=1e-5)
    # Nothing of a clip before is left, and the look at the pixels is part of the graph.
    path = tmp_path / "model.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    session = open_session(path)
    for clips in (still, moving):
        assert np.allclose(session.run(clips.numpy()), planned(clips).numpy(), atol=1e-5)


def test_the_first_frame_always_stays(tiny: Tiny) -> None:
    model = tiny("vivit")
    section = section_of(model, [15, 15, 15], "static_frames", "plain")
    with pytest.raises(
        InputError, match="must be at least 16, since static_frames keeps the first"
    ):
        apply_reduction(model, section)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "static_frames"])
def test_techniques_work_inside_a_model(tiny: Tiny, name: str) -> None:
    model = tiny("vivit")
    planned = model.copy()
    state = apply_reduction(planned, section_of(model, [32, 16, 16], name, "proportional"))
    assert state is not None
    clips = model.example(2)
    output = planned(clips)
    assert torch.isfinite(output).all()
    assert not torch.equal(output, model(clips))
    assert state.sizes is not None
    assert state.sizes.shape == (2, 16)
    if TECHNIQUES[name].conserves:
        assert torch.allclose(state.sizes.sum(1), torch.full((2,), 32.0))
