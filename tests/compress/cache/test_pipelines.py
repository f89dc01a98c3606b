"""Caches in the real pipelines of diffusers, around tiny denoisers with random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.spec.errors import InputError

FAMILIES = ("wan", "cogvideox", "ltx", "hunyuan", "mochi", "latte")
STEPS = 8
POLICIES: dict[str, dict[str, Any]] = {
    "temporal_delta": {"threshold": 10.0}, "magcache": {"threshold": 10.0},
    "easycache": {"threshold": 10.0}, "teacache": {"threshold": 10.0},
    "first_block": {"threshold": 10.0}, "taylorseer": {"interval": 3}, "fixed": {"interval": 3},
    "forecast": {
        "compute_steps": (0, 1, 4, 6), "protect_first": 0, "protect_last": 0,
        "mixture": ((), (), *((2, -1),) * 2, (), (1,), (), (2, -1)),
    },
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*In CPU autocast:UserWarning")


def section(policy: str, family: str, **settings: Any) -> CacheSection:
    # Wan tells its steps; the others have to be told.
    steps = None if family.startswith("wan") else STEPS
    return CacheSection(policy=policy, num_steps=steps, **{**POLICIES[policy], **settings})


def runs_of_blocks(transformer: nn.Module) -> Counter[str]:
    """How often each attention in the blocks runs to its end from now on, by block."""
    runs: Counter[str] = Counter()
    for name, module in transformer.named_modules():
        stem, _, last = name.rpartition(".")
        if last == "attn1" or (last == "attn" and "refiner" not in name):
            # Behind it: the signal of TeaCache goes into the first one, but not through it.
            module.register_forward_hook(lambda *_, stem=stem: runs.update([stem]))
    return runs


def test_what_a_user_does(make: Any) -> None:
    pipe = make("wan").pipe
    settings = make("wan").keywords
    cached = apply_cache(pipe.transformer, CacheSection(policy="first_block", threshold=0.5))
    video = pipe(num_inference_steps=8, output_type="latent", **settings).frames
    report = cached.report()
    assert video.shape == (1, 4, 2, 4, 4)
    assert report.hits.shape == (2, 8)
    assert report.skip_rate > 0.2
    assert list(report.branch_hits) == ["cond", "uncond"]
    assert "blocks.1 ###....#" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_never_skips_changes_no_bit(make: Callable[[str], Any], family: str) -> None:
    pipe = make(family)
    expected = pipe()
    for policy in ("temporal_delta", "easycache", "teacache", "first_block"):
        with apply_cache(pipe.transformer, section(policy, family, protect_first=STEPS)) as cached:
            assert torch.equal(pipe(), expected), policy
            with pytest.warns(UserWarning, match="reused nothing"):
                assert cached.report().hits.sum() == 0
    assert torch.equal(pipe(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_blocks_do_not_run(make: Callable[[str], Any], family: str) -> None:
    pipe = make(family)
    expected = pipe()
    runs = runs_of_blocks(pipe.transformer)
    for policy in POLICIES:
        with apply_cache(pipe.transformer, section(policy, family)) as cached:
            runs.clear()
            frames = pipe()
            report = cached.report()
        computed = dict(zip(report.blocks, (report.calls - report.hits).sum(axis=1), strict=True))
        assert dict(runs) == computed, policy
        assert report.skip_rate >= 0.2, policy
        assert report.num_generations == 1, policy
        assert frames.isfinite().all()
        # Tiny random denoisers change little from step to step, so little is lost.
        error = (frames - expected).abs().mean() / expected.abs().mean()
        assert 0 < error < 0.35, policy


def test_one_policy_decides_alike_in_every_generation(make: Any) -> None:
    pipe = make("hunyuan")
    with apply_cache(pipe.transformer, section("teacache", "hunyuan", threshold=0.1)):
        first = pipe(seed=3)
        pipe(seed=4)
        assert torch.equal(pipe(seed=3), first)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_teacache_looks_at_what_the_first_layer_of_attention_is_given(
    make: Any, family: str
) -> None:
    pipe = make(family)
    seen: list[torch.Tensor] = []
    with apply_cache(pipe.transformer, section("teacache", family, threshold=0.0)) as cached:
        first = pipe.transformer.get_submodule(cached._denoisers[0].blocks[0])
        first.attn1.to_q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        pipe()
        (denoiser,) = cached._denoisers
        state = list(denoiser.branches.values())[-1].decisions[0]
        assert torch.equal(state["reference"], seen[-1])


def test_another_resolution_begins_again(make: Any) -> None:
    pipe = make("wan")
    with apply_cache(pipe.transformer, section("fixed", "wan")):
        small = pipe()
        pipe(height=48)
        assert torch.equal(pipe(), small)


def test_a_pipeline_that_is_stopped_leaves_the_next_run_right(make: Any) -> None:
    pipe = make("ltx")

    def stop(running: Any, step: int, _timestep: Any, tensors: Any) -> Any:
        running._interrupt = step >= 4
        return tensors

    with apply_cache(pipe.transformer, section("fixed", "ltx")):
        expected = pipe()
        pipe(seed=5, callback_on_step_end=stop)
        assert torch.equal(pipe(), expected)


def test_both_transformers_of_wan_share_the_steps_of_a_run(make: Any) -> None:
    pipe = make("wan of two").pipe
    run = make("wan of two")
    run.pipe = pipe
    both = (pipe.transformer, pipe.transformer_2)
    settings = {"protect_first": 2, "protect_last": 2, "interval": 99}
    with apply_cache(both, CacheSection(policy="fixed", **settings)) as cached:
        run()
        rows = str(cached.report()).splitlines()[-4:]
    # The boundary of 0.6 is after three steps of eight; the second begins with a computed step.
    assert rows[0] == "transformer.blocks.0   ##.     "
    assert rows[2] == "transformer_2.blocks.0    #..##"


def test_a_cache_of_diffusers_is_not_stacked_upon(make: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = make("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match="disable_cache"):
        apply_cache(pipe.transformer, section("fixed", "wan"))


def test_the_scheduler_of_a_pipeline_can_be_followed(make: Any) -> None:
    pipe = make("mochi")
    unknown = CacheSection(policy="fixed", interval=99)
    with apply_cache(pipe.transformer, unknown, scheduler=pipe.pipe.scheduler) as cached:
        pipe()
        assert "blocks.0 ###....#" in str(cached.report())
