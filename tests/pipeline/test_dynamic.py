"""Dynamic precision is decided on generated clips, and written where it is worth it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from vcompress.benchmarks.denoiser_zoo import build
from vcompress.cli import cli
from vcompress.compress.dynamic.calibrate import Point
from vcompress.compress.frozen import freeze
from vcompress.models.load import load_model
from vcompress.pipeline.cache_sampler import Case, Sampler
from vcompress.pipeline.cache_search import Bar
from vcompress.pipeline.dynamic_report import write_precision_report
from vcompress.pipeline.dynamic_request import DynamicFound, dynamic_request
from vcompress.pipeline.dynamic_search import (
    DynamicSearch,
    Protection,
    best_signal,
    correlations,
)
from vcompress.pipeline.run import Options, Silent
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan

SIZE = {"num_frames": 5, "height": 32, "width": 32, "guidance_scale": 2.0}
NAMES = ("prompt_embeds", "negative_prompt_embeds")


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
        transformer=build("WanTransformer3DModel"),
    )  # fmt: skip
    return Sampler(pipe, name="tiny", num_steps=8, call=SIZE)


def test_the_largest_share_that_holds_is_found(sampler: Sampler, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {name: torch.randn(1, 4, 32, generator=generator) for name in NAMES}
    search = DynamicSearch(sampler, "transformer", [Case(texts, 0)], Silent())
    planned = build("WanTransformer3DModel")
    for name, layer in list(planned.blocks.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(planned.blocks.get_submodule(parent), child, freeze(layer, "nvfp4", 4.0))
    original = sampler.pipe.transformer
    search.use(planned)
    try:
        fine = search.trial(search.uniform(four_bits=False))
        four = search.trial(search.uniform(four_bits=True))
        assert fine.psnr_db[0] > four.psnr_db[0]
        assert (fine.report.share, four.report.share) == (0, 1)
        search.measure()
        assert {point.step for point in search.points} == set(range(8))
        ends = search.probe(fine, four)
        # Half of what eight bits save.
        bar = Bar("psnr_db", -10 * np.log10((fine.squared_error + four.squared_error) / 2))
        families = search.run(bar, ends)
        again = search.trial(next(each for each in families.values() if each).section)
    finally:
        search.use(original)
    held = {name: trial for name, trial in families.items() if trial is not None}
    assert held
    for trial in held.values():
        assert trial.psnr_db[0] >= bar.least
        assert 0 < trial.report.share < 1
    # What was found is what runs.
    assert again.psnr_db == next(iter(held.values())).psnr_db
    name, best = next(iter(held.items()))
    evidence = {
        "four_bits_held_out": four.as_dict(), "signal": "added", "explained": 0.5,
        "correlation": {"blocks.0": 0.5},
        "worth_of_ends": {"first": ends.first, "last": ends.last, "steps": ends.width},
        "families": {each: trial and trial.as_dict() for each, trial in families.items()},
    }  # fmt: skip
    found = DynamicFound(
        name="tiny", bar=bar, family=name, trial=best, evidence=evidence, cases=(Case("a", 0),),
        full=tuple(search.full),
    )  # fmt: skip
    write_precision_report(found, tmp_path / "precision.html", artifact="out")
    page = (tmp_path / "precision.html").read_text()
    assert page.count("data:image/webp") == 1
    assert f"{best.report.share:.1%} of the work" in page


def test_an_end_is_protected_if_it_is_worth_more_than_others() -> None:
    # A tenth of 50 steps; worth more than a fifth of the whole.
    ends = Protection(num_steps=50, first=0.3, last=0.1)
    assert ends.protect == (5, 0)
    # Of 20 fine steps three quarters go where three quarters of the worth are.
    assert ends.split(0.6) == (15, 5)
    assert Protection(num_steps=50, first=-0.1, last=0.0).split(0.6) == (10, 10)


def test_the_signal_that_explains_more_is_taken() -> None:
    values = ((0.1, 0.3, 1.0), (0.2, 0.1, 2.0), (0.3, 0.2, 3.0))
    points = [
        Point(run=1, branch="a", block="b", step=step, added=added, moved=moved, error=error)
        for step, (added, moved, error) in enumerate(values)
    ]
    signal, explained = best_signal(points)
    assert (signal, explained) == ("added", pytest.approx(1.0))
    still = [replace(point, error=0.1) for point in points]
    # What never changes has no correlation, and a plan file has no number for that.
    assert correlations(still, "added") == {"b": None}
    # Nor has a run of one step, in which no signal is ever known.
    alone = [replace(point, step=0, added=None, moved=None) for point in points]
    assert best_signal(alone) == ("added", 0.0)


def test_nothing_is_written_where_four_bits_hold_everywhere(
    sampler: Sampler, tmp_path: Path
) -> None:
    sampler.pipe.save_pretrained(tmp_path / "wan")
    texts = {name: torch.randn(2, 4, 32) for name in NAMES}
    torch.save({**texts, **SIZE, "num_inference_steps": 8}, tmp_path / "prompts.pt")
    arguments = [
        "plan", str(tmp_path / "wan"), "--target", "nvfp4", "--algorithm", "max",
        "--max-layer-error", "9", "--num-clips", "4", "--prompts", str(tmp_path / "prompts.pt"),
        "--output", str(tmp_path / "plan.json"), "--dynamic-precision", "--quiet",
    ]  # fmt: skip
    refused = CliRunner().invoke(cli, arguments)
    assert isinstance(refused.exception, InputError)
    assert "needs --min-psnr" in str(refused.exception)
    result = CliRunner().invoke(cli, [*arguments, "--min-psnr", "1"])
    assert result.exit_code == 0, result.output
    plan = CompressionPlan.load(tmp_path / "plan.json")
    assert plan.dynamic_precision is None
    found = plan.evidence["dynamic_precision"]
    assert "hold PSNR 1 dB in every step" in found["reason"]
    # The bar is held against the plan as it stands.
    assert len(found["held_out"]["psnr_db"]) > 1
    # So it is where nothing can change at all.
    result = CliRunner().invoke(cli, [
        *arguments, "--min-psnr", "1", "--force", "--target", "int8",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = CompressionPlan.load(tmp_path / "plan.json").evidence["dynamic_precision"]
    assert "has none in its blocks" in found["reason"]
    assert min(found["held_out"]["psnr_db"]) > 20


def test_dynamic_precision_is_for_denoisers() -> None:
    model = load_model("reference:penvideo20")
    options = Options(dynamic_precision=True, min_psnr=30)
    with pytest.raises(InputError, match="is for denoisers"):
        dynamic_request(model, model, options, Silent())
