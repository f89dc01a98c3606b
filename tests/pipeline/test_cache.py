"""A cache found for a pipeline, written as a plan, and taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vcompress.benchmarks.denoiser_zoo import build
from vcompress.compress.cache import CacheSection, Trajectory, apply_cache
from vcompress.compress.cache.ladder import evenly_spread, ladders
from vcompress.models.load import load_model
from vcompress.pipeline import record
from vcompress.pipeline.cache import cached, find_cache
from vcompress.pipeline.cache_request import JointSearch, cache_request
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, read_prompts
from vcompress.pipeline.cache_search import Bar, Search, lower_bound, run_section
from vcompress.pipeline.order import write_plan
from vcompress.pipeline.run import Options, Recorded, Silent
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.frames import psnr_db, ssim

SIZE = {"num_frames": 5, "height": 32, "width": 32, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
        transformer=build("WanTransformer3DModel"),
    )  # fmt: skip
    return Sampler(pipe, name="tiny", num_steps=12, call=SIZE)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.pt"
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {
            name: torch.randn(2, 4, 32, generator=generator)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        },
        path,
    )
    return path


def test_a_target_is_found_held_out_and_written(
    sampler: Sampler, prompts: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "cache.json"
    found = find_cache(sampler, plan, prompts=prompts, min_psnr=30, num_clips=1)
    assert found.section is not None
    assert found.held_out is not None
    assert found.calibration is not None
    assert min(found.calibration.psnr_db) >= 30
    assert found.held_out.report.hits.any()
    assert CompressionPlan.load(plan).cache == found.section
    page = plan.with_suffix(".html").read_text()
    assert page.count("data:image/webp") == 1
    assert page.count("data:image/png") == 1
    # What was found is what a pipeline of the user does.
    case = found.cases[0]
    with cached(sampler.pipe, plan) as handle:
        clip = sampler.sample(case)
    np.testing.assert_array_equal(clip, found.held_out.clips[0])
    assert handle.report().skip_rate == pytest.approx(found.held_out.report.skip_rate)
    np.testing.assert_array_equal(sampler.sample(case), found.full[0])


def test_a_cache_is_planned_with_the_quantized_layers(
    sampler: Sampler, prompts: Path, tmp_path: Path
) -> None:
    sampler.pipe.save_pretrained(tmp_path / "wan")
    stored = torch.load(prompts)
    torch.save({**stored, **SIZE, "num_inference_steps": 10}, tmp_path / "prompts.pt")
    options = Options(
        target="int8", cache="auto", min_psnr=20, prompts=tmp_path / "prompts.pt", num_clips=4
    )
    plan = write_plan(str(tmp_path / "wan"), tmp_path / "plan.json", options=options)
    assert any(choice.format == "int8" for choice in plan.quantize.values())
    assert plan.cache is not None
    measured = plan.evidence["cache"]
    assert min(measured["calibration"]["psnr_db"]) >= 20
    assert measured["held_out"]["skip_rate"] > 0
    told = record._generation(plan, 20.0)
    assert told is not None
    assert told["skip_percent"] == pytest.approx(100 * measured["held_out"]["skip_rate"])
    assert told["psnr_db"] == measured["held_out"]["psnr_db"]
    assert told["speed_ratio"] is not None
    assert told["speed_ratio"] > 0
    assert told["cache_policy"] == plan.cache.policy
    assert CompressionPlan.load(tmp_path / "plan.json").cache == plan.cache


def test_precision_alone_below_the_target_ends_the_search(
    sampler: Sampler, prompts: Path, tmp_path: Path
) -> None:
    sampler.pipe.save_pretrained(tmp_path / "wan")
    stored = torch.load(prompts)
    torch.save({**stored, **SIZE, "num_inference_steps": 8}, tmp_path / "prompts.pt")
    options = Options(
        target="nvfp4", cache="auto", min_psnr=90, prompts=tmp_path / "prompts.pt",
        max_layer_error=0.2,
    )  # fmt: skip
    told = Recorded(Silent())
    search = JointSearch(str(tmp_path / "wan"), "transformer", Bar("psnr_db", 90), options, told)
    coarse = build("WanTransformer3DModel")
    with torch.no_grad():
        coarse.get_parameter("patch_embedding.weight").mul_(1.05)
    section, evidence = search(coarse)
    assert (section, search.found) == (None, None)
    assert "precision alone, with every step computed, is at" in evidence["reason"]
    assert "no cache was searched" in evidence["reason"]
    assert "--max-layer-error 0.05 (now 0.2) or --target int8" in evidence["reason"]
    assert told.warnings == [evidence["reason"]]
    # What the artifact is judged by is that of the held-out clips.
    assert max(evidence["held_out"]["psnr_db"]) < 90


def test_a_cache_is_for_denoisers(tmp_path: Path) -> None:
    model = load_model("reference:penvideo20")
    with pytest.raises(InputError, match="is for denoisers"):
        cache_request(model, model, Options(cache="auto", min_psnr=30), Silent())


def test_two_transformers_share_one_schedule(prompts: Path, tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    both = [build("WanTransformer3DModel") for _ in range(2)]
    with torch.no_grad():
        # What they return differs, so that nothing of one can stand for the other.
        both[1].proj_out.weight.mul_(-1.5)  # type: ignore[union-attr, operator]
    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=both[0],
        transformer_2=both[1], boundary_ratio=0.7,
    )  # fmt: skip
    two = Sampler(pipe, name="two", num_steps=10, call=SIZE)
    case = Case(read_prompts(prompts, two)[0], 0)
    search = Search(two, [case], Silent())
    schedule = search.ladders()[0]
    (best,) = search.run(Bar("psnr_db", 30.0), [schedule])
    assert best.best is not None
    section = best.best.section
    assert section.starts is not None
    assert section.compute_steps is not None
    first, second = section.starts
    assert first == 0 < second < 10
    # Nothing is carried over: the second transformer begins with a step that it computes.
    assert second in section.compute_steps
    assert best.best.psnr_db[0] >= 30
    assert best.best.report.skip_rate == 1 - len(section.compute_steps) / 10
    # The pipeline of Wan tells its steps, so that each finds its part alone as well.
    with apply_cache(both[0], section), apply_cache(both[1], section):
        np.testing.assert_array_equal(two.sample(case), best.best.clips[0])


def test_few_steps_are_not_cached(sampler: Sampler, prompts: Path, tmp_path: Path) -> None:
    few = Sampler(sampler.pipe, name="few", num_steps=4, call=SIZE)
    found = find_cache(few, tmp_path / "cache.json", prompts=prompts, min_psnr=30)
    assert found.section is None
    assert "cannot pay" in found.reason
    assert not list(tmp_path.iterdir())


def test_distilled_models_are_told_by_their_scheduler(prompts: Path, tmp_path: Path) -> None:
    from diffusers import LCMScheduler, WanPipeline

    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=LCMScheduler(),
        transformer=build("WanTransformer3DModel"),
    )  # fmt: skip
    distilled = Sampler(pipe, name="distilled", num_steps=12, call=SIZE)
    found = find_cache(distilled, tmp_path / "cache.json", prompts=prompts, min_psnr=30)
    assert (found.section, found.holds) == (None, True)
    assert "distilled" in found.reason
    assert not list(tmp_path.iterdir())


def test_what_holds_has_a_margin_for_other_clips() -> None:
    # Mean 31, standard error 1; of two clips 3.08 of them.
    assert lower_bound((30.0, 32.0)) == pytest.approx(31 - 3.08)
    assert lower_bound((31.0,)) == 31
    bar = Bar("psnr_db", 30.0)
    assert bar.holds((30.0, 32.0))
    assert not bar.holds((30.0, 32.0), margin=True)
    assert bar.holds((32.0, 32.5, 33.0, 33.5), margin=True)


def test_a_clip_is_judged_by_a_fit_to_the_others(sampler: Sampler, prompts: Path) -> None:
    texts = read_prompts(prompts, sampler)
    cases = [Case(texts[0], 0), Case(texts[1], 1)]
    search = Search(sampler, cases, Silent())
    schedule = search.ladders()[0]
    assert schedule.name == "schedule"
    place = len(schedule.rungs) // 2
    first, second = schedule.refit(place, 2)
    assert first != second
    trial = search.trial(schedule.rungs[place], refit=(first, second))
    alone = run_section(sampler, second, cases[1:], search.full[1:])
    np.testing.assert_array_equal(trial.clips[1], alone.clips[0])
    assert trial.section == schedule.rungs[place]


def test_a_bar_that_nothing_holds_caches_nothing(sampler: Sampler, prompts: Path) -> None:
    case = Case(read_prompts(prompts, sampler)[0], 0)
    search = Search(sampler, [case], Silent())
    (family,) = [one for one in search.ladders() if one.name == "fixed"]
    (found,) = search.run(Bar("psnr_db", 101.0), [family])
    assert found.best is None


def test_computing_everything_is_exact(sampler: Sampler, prompts: Path) -> None:
    case = Case(read_prompts(prompts, sampler)[0], 0)
    full = sampler.sample(case)
    exact = CacheSection(policy="fixed", interval=1)
    trial = run_section(sampler, exact, [case], [full])
    assert trial.psnr_db == (100.0,)
    assert trial.report.skip_rate == 0


def test_held_out_clips_share_nothing_with_calibration() -> None:
    own, others = make_cases(["a", "b", "c"], 3, 7)
    assert {case.prompt for case in own} & {case.prompt for case in others} == set()
    assert {case.seed for case in own} & {case.seed for case in others} == set()
    own, others = make_cases(["a"], 2, 0)
    assert set(own) & set(others) == set()


@pytest.mark.parametrize("bars", [{}, {"min_psnr": 30.0, "min_ssim": 0.9}])
def test_one_target_is_needed(bars: dict[str, float]) -> None:
    with pytest.raises(InputError, match="one quality target"):
        find_cache("nowhere", **bars)  # type: ignore[arg-type]


def test_ladders_rise_in_one_setting_only() -> None:
    steps = {step: 0.1 + 0.01 * step for step in range(1, 12)}
    observed = [Trajectory("", "cond", 1, dict(steps), dict(steps), dict.fromkeys(steps, 1.0))]
    for ladder in ladders(12, observed):
        first = ladder.rungs[0].as_dict()
        for rung in ladder.rungs[1:]:
            changed = {name for name, value in rung.as_dict().items() if value != first[name]}
            assert changed <= {"threshold", "interval", "compute_steps"}
    assert evenly_spread(10, 5, 3) == (0, 1, 2, 3, 6, 9)


def test_quality_by_hand() -> None:
    clip = np.zeros((1, 4, 4, 1), np.float32)
    assert psnr_db(clip, clip + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(clip, clip) == 100.0
    assert ssim(clip, clip) == pytest.approx(1.0)
    # Of flat pictures only the luminance term is left.
    assert ssim(clip, clip + 0.1) == pytest.approx(0.0001 / (0.01 + 0.0001), rel=1e-4)
