"""Token merging: exact where the answer is known, static in ONNX, better than its controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vcompress.compress.tokens.merging import Matching, match, max_merges, merge
from vcompress.compress.tokens.plan import constant_schedule, plan_merging
from vcompress.compress.tokens.surgery import apply_merging
from vcompress.models.load import LoadOptions, load_model, wrap_module
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.plan import TokenSection


def test_the_most_similar_pair_is_averaged_by_size() -> None:
    # A = tokens 0, 2; B = tokens 1, 3. Token 2 equals token 1 in direction, so it merges into it.
    # Sizes 3 and 1: the mean of 4 and 8 is (1 * 4 + 3 * 8) / 4 = 7.
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [0.0, 8.0], [1.0, 1.0]]])
    sizes = torch.tensor([[1.0, 1.0, 3.0, 1.0]])
    matching = match(tokens, 1)
    assert matching.source.tolist() == [[1]]
    assert matching.target.tolist() == [[0]]
    merged, new_sizes = merge(tokens, sizes, matching)
    assert merged.tolist() == [[[1.0, 0.0], [0.0, 7.0], [1.0, 1.0]]]
    assert new_sizes.tolist() == [[1.0, 4.0, 1.0]]


@pytest.mark.parametrize(("num_tokens", "special"), [(8, 0), (9, 1), (10, 2), (13, 5), (2, 0)])
def test_mass_is_conserved_and_special_tokens_stay(num_tokens: int, special: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randn(3, num_tokens, 7, generator=generator)
    for merges in range(max_merges(num_tokens, special) + 1):
        matching = match(tokens, merges, special)
        merged, sizes = merge(tokens, torch.ones(3, num_tokens), matching)
        assert merged.shape == (3, num_tokens - merges, 7)
        assert torch.allclose(sizes.sum(1), torch.full((3,), float(num_tokens)))
        # The mean over all patches does not change either.
        before, after = tokens.mean(1), (merged * sizes[..., None]).sum(1) / num_tokens
        assert torch.allclose(before, after, atol=1e-5)
        if special:
            assert torch.equal(merged[:, 0], tokens[:, 0])
            assert (sizes[:, 0] == 1).all()


def test_identical_tokens_merge_without_loss() -> None:
    tokens = torch.randn(1, 1, 6).expand(2, 16, 6).contiguous()
    merged, sizes = merge(tokens, torch.ones(2, 16), match(tokens, 8))
    assert torch.allclose(merged, tokens[:, :8])
    assert sizes.sum(1).tolist() == [16.0, 16.0]


def test_zero_keys_do_not_make_nan() -> None:
    merged, _ = merge(torch.zeros(1, 8, 4), torch.ones(1, 8), match(torch.zeros(1, 8, 4), 3))
    assert torch.isfinite(merged).all()


def test_merging_the_similar_beats_merging_at_random() -> None:
    # Pairs of nearly equal tokens: matching must find them, a random partner is far away.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 16, 12, generator=generator)
    tokens = torch.stack([base, base + 0.01 * torch.randn(base.shape, generator=generator)], 2)
    tokens = tokens.flatten(1, 2)
    good = match(tokens, 8)
    shuffled = Matching(
        source=good.source, target=torch.randint(0, 16, good.target.shape, generator=generator),
        kept=good.kept,
    )  # fmt: skip

    def spread(matching: Matching) -> float:
        merged, sizes = merge(tokens, torch.ones(4, 32), matching)
        # Variance that averaging destroyed: 0 when only equal tokens were averaged.
        return float(tokens.pow(2).sum() - (merged.pow(2) * sizes[..., None]).sum())

    assert spread(good) < 0.05 * spread(shuffled)


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.7, 0.5])
def test_the_schedule_keeps_the_ratio(ratio: float) -> None:
    schedule = constant_schedule(1568, 0, 12, ratio)
    seen = [1568 - sum(schedule[:block]) for block in range(12)]
    assert np.mean(seen) / 1568 == pytest.approx(ratio, abs=0.01)
    assert schedule[-1] == 0


def tiny(family: str) -> VideoModel:
    import transformers

    torch.manual_seed(0)
    common = {
        "image_size": 32, "patch_size": 8, "num_channels": 3, "num_frames": 4, "hidden_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5,
    }  # fmt: skip
    from vcompress.models import load

    adapter = next(adapter for adapter in load.ADAPTERS if adapter.family == family)
    config = {**common, "tubelet_size": 2 if family == "videomae" else [2, 8, 8]}
    module = adapter.build(config)
    del transformers
    return load.from_checkpoint(
        load.checkpoints.Checkpoint(family=family, config=config, state_dict=module.state_dict()),
        name=family, source=family, options=LoadOptions(),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["videomae", "vivit"])
def test_no_merges_change_no_bit(family: str) -> None:
    model = tiny(family)
    planned = model.copy()
    section = plan_merging(model, 1.0, model.example(2))
    assert set(section.merge.values()) == {0}
    apply_merging(planned, section)
    assert torch.equal(planned(model.example(2)), model(model.example(2)))


@pytest.mark.parametrize("family", ["videomae", "vivit"])
@pytest.mark.parametrize("proportional", [False, True])
def test_merged_models_export_and_match(tmp_path: Path, family: str, proportional: bool) -> None:
    from vcompress.export.graph import export_onnx
    from vcompress.export.runtime import open_session

    model = tiny(family)
    assert model.token_grid is not None
    num_tokens = model.token_grid.num_tokens
    planned = model.copy()
    section = TokenSection(
        technique="bipartite_soft_matching", proportional=proportional, num_tokens=num_tokens,
        merge=dict(zip(model.blocks, (6, 6, 0), strict=True)),
    )  # fmt: skip
    apply_merging(planned, section)
    path = tmp_path / "merged.onnx"
    export_onnx(PrimaryOutput(planned.module), model.example(), path, dialect="portable")
    session = open_session(path)
    for seed in (1, 2):
        clips = model.example(1, seed=seed)
        expected = planned(clips)
        assert not torch.equal(expected, model(clips))
        assert np.allclose(session.run(clips.numpy()), expected.numpy(), atol=1e-5)
    import onnx

    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"NonZero", "ScatterElements", "ScatterND", "Loop", "If"}


def test_a_state_never_leaks_between_clips() -> None:
    model = tiny("videomae")
    planned = model.copy()
    apply_merging(planned, plan_merging(model, 0.7, model.example(2)))
    first = planned(model.example(1, seed=1))
    planned(model.example(3, seed=2))
    assert torch.equal(planned(model.example(1, seed=1)), first)


def test_a_copy_of_a_merged_model_merges_on_its_own() -> None:
    model = tiny("videomae")
    planned = model.copy()
    apply_merging(planned, plan_merging(model, 0.7, model.example(2)))
    copied = planned.copy()
    for _ in range(2):
        assert torch.equal(copied(model.example(1, seed=3)), planned(model.example(1, seed=3)))


def test_what_cannot_merge_says_why() -> None:
    model = wrap_module(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * 4 * 4, 5)), name="plain",
        options=LoadOptions(input_spec="NCTHW:float32:1x3x2x4x4"),
    )  # fmt: skip
    with pytest.raises(InputError, match="token grid of family 'generic' is not known"):
        plan_merging(model, 0.5, model.example())
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        plan_merging(tiny("videomae"), 1.5, model.example())
    tokens = tiny("videomae")
    section = TokenSection(
        technique="bipartite_soft_matching", proportional=False, num_tokens=32,
        merge=dict(zip(tokens.blocks, (20, 0, 0), strict=True)),
    )  # fmt: skip
    with pytest.raises(
        InputError, match="20 of 32 tokens cannot be merged at once; the most is 16"
    ):
        apply_merging(tokens, section)


def test_the_reference_model_bears_a_tenth_less() -> None:
    from vcompress.calib.sources import open_clips

    model = load_model("reference:penvideo20")
    clips = open_clips(
        "reference:penvideo20", model.clip, part="test", limit=200, seed=0, labels=model.labels
    )
    batch = torch.from_numpy(next(clips.batches(200)))
    labels = torch.tensor(clips.labels)
    planned = model.copy()
    apply_merging(planned, plan_merging(model, 0.9, batch[:16]))
    before = (model(batch).argmax(-1) == labels).float().mean()
    after = (planned(batch).argmax(-1) == labels).float().mean()
    assert after >= before - 0.02
