"""Centres in a plan: fitted site after site, stored with its tensors, exact for constant groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vcompress
from vcompress.calib.clips import Clips
from vcompress.compress.tensors import TOKENS
from vcompress.compress.tokens.fitting import fit_sites
from vcompress.compress.tokens.surgery import apply_reduction, centers_name
from vcompress.compress.tokens.trials import Trials
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.planning import apply_plan, empty_plan, make_plan, read_plan, save_plan
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection, TokenSite

Tiny = Callable[[str], VideoModel]


def section_with(model: VideoModel, *sites: tuple[int, str, int]) -> TokenSection:
    return TokenSection(
        attention="proportional", num_patches=32,
        sites={
            model.token_blocks[block]: TokenSite(technique=technique, keep=keep)
            for block, technique, keep in sites
        },
    )  # fmt: skip


def clips_of_kinds(model: VideoModel, count: int, kinds: int) -> torch.Tensor:
    """Clips of 2 x 4 x 4 patches, each of one of a few kinds, the same kinds in all clips."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.randn(kinds, 2, 3, 8, 8, generator=generator)
    chosen = torch.randint(kinds, (count, 2, 4, 4), generator=generator)
    patches = looks[chosen].permute(0, 1, 4, 5, 2, 6, 3, 7)
    return 3 * patches.reshape(count, *model.clip.input_shape)


def without_positions(model: VideoModel) -> VideoModel:
    for name, parameter in model.module.named_parameters():
        if "position_embeddings" in name:
            parameter.requires_grad_(False).zero_()
    return model


def test_constant_groups_lose_nothing(tiny: Tiny) -> None:
    model = without_positions(tiny("vivit"))
    clips = clips_of_kinds(model, 12, 4)
    section = section_with(model, (1, "centroids", 4))
    tensors = fit_sites(model, section, [clips[:6], clips[6:]], seed=0)
    assert list(tensors) == [centers_name(model.token_blocks[1])]
    planned = model.copy()
    state = apply_reduction(planned, section, tensors)
    assert torch.allclose(planned(clips), model(clips), atol=1e-4)
    assert state is not None
    assert state.sizes is not None
    assert torch.allclose(state.sizes.sum(1), torch.full((12,), 32.0))
    # The test can fail: patches of other kinds are not what was fitted.
    others = torch.randn(2, *model.clip.input_shape, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(planned(others), model(others), atol=1e-4)


def test_fitted_and_pixel_techniques_export_and_build(
    tiny: Tiny, tmp_path: Path, builds_in_tensorrt: Callable[..., None]
) -> None:
    model = tiny("vivit")
    section = section_with(model, (0, "detail", 24), (1, "centroids", 6))
    planned, batch = model.copy(), model.example(8)
    apply_reduction(planned, section, fit_sites(model, section, [batch], seed=0))
    path = tmp_path / "reduced.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(1, seed=seed)
        expected = planned(clips)
        assert not torch.allclose(expected, model(clips), atol=1e-5)
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    builds_in_tensorrt(path)


def test_a_plan_holds_the_centres(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("vivit")
    generator = np.random.default_rng(0)
    array = generator.normal(size=(16, *model.clip.input_shape)).astype("f4")
    clips = Clips.from_array(array, model.clip)
    section = section_with(model, (0, "centroids", 20), (2, "centroids", 8))
    written = tmp_path / "tokens.json"
    save_plan(replace(empty_plan(model, clips, vcompress.Options()), tokens=section), {}, written)
    options = vcompress.Options(target="int8", tokens=str(written), algorithm="max")
    save_plan(*make_plan(model, clips, options), tmp_path / "plan.json")
    plan, tensors = read_plan(tmp_path / "plan.json")
    assert plan.tokens == section
    widths = [tensors[TOKENS][centers_name(model.token_blocks[block])].shape for block in (0, 2)]
    # In front of the first block tokens are compared, elsewhere keys of a head.
    assert widths == [(20, 32), (8, 16)]
    planned, batch = apply_plan(model, plan, tensors), torch.from_numpy(array[:4])
    alone = model.copy()
    apply_reduction(alone, section, tensors[TOKENS])
    assert torch.nn.functional.cosine_similarity(planned(batch), alone(batch)).min() > 0.95
    with pytest.raises(InputError, match=r"no 20 centres for it; use another technique there"):
        apply_plan(model, plan, {})
    narrow = {centers_name(name): torch.randn(keep, 3) for name, keep in (
        (model.token_blocks[0], 20), (model.token_blocks[2], 8),
    )}  # fmt: skip
    apply_reduction(spoilt := model.copy(), section, narrow)
    with pytest.raises(InputError, match="have 3 channels, the keys there 32"):
        spoilt(batch)


def test_the_search_measures_what_it_fitted(tiny: Tiny) -> None:
    model = tiny("vivit")
    section = section_with(model, (1, "centroids", 12))
    trials = Trials(model, [model.example(8)])
    assert trials.objection(section) is None
    assert 0 < trials.measure(section).loss < float("inf")
    again = Trials(model, [model.example(8)])
    assert all(torch.equal(*pair) for pair in zip(
        trials.fitted(section).values(), again.fitted(section).values(), strict=True
    ))  # fmt: skip
    few = Trials(model, [model.example(7)])
    assert few.objection(section) == "centres need at least 8 calibration clips, got 7"
    with pytest.raises(InputError, match="cannot be fitted: centres need at least 8"):
        few.measure(section)
