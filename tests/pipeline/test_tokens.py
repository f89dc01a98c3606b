"""`vcompress tokens`: a plan under one bar, which quantize and apply take over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vcompress
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, make_plan, read_plan
from vcompress.pipeline.tokens import find_tokens, latency_share
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection
from vcompress.validate.latency import LatencyStatistics, measure_interleaved

SOURCE = "reference:penvideo20"


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(SOURCE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenSection]:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    options = vcompress.Options(calib=SOURCE, num_clips=64)
    schedule = find_tokens(SOURCE, path, options=options, max_flops=0.45)
    assert schedule.flop_share <= 0.45
    assert schedule.num_measured > 20
    return path, schedule.section


def test_the_plan_can_be_applied_alone(model: VideoModel, found: tuple[Path, TokenSection]) -> None:
    plan, tensors = read_plan(found[0])
    assert plan.tokens == found[1]
    assert {choice.format for choice in plan.quantize.values()} == {"keep"}
    clips = model.example(2)
    difference = apply_plan(model, plan, tensors)(clips) - model(clips)
    assert 0 < float(difference.norm()) < float(model(clips).norm())


def test_quantize_takes_the_schedule_over(
    model: VideoModel, found: tuple[Path, TokenSection]
) -> None:
    request = ClipRequest(calib=SOURCE, data=None, num_clips=64, num_test_clips=10, seed=0)
    calibration = open_clip_sets(request, model.clip, model.labels).calibration
    options = vcompress.Options(target="int8", calib=SOURCE, tokens=str(found[0]))
    plan, tensors = make_plan(model, calibration, options)
    assert plan.tokens is not None
    assert plan.tokens.sites == found[1].sites
    assert ("tokens" in tensors) == (plan.tokens.readout is not None)
    assert any(choice.format == "int8" for choice in plan.quantize.values())


def test_auto_holds_the_bar_on_its_clips(model: VideoModel) -> None:
    request = ClipRequest(calib=SOURCE, data=None, num_clips=64, num_test_clips=10, seed=0)
    calibration = open_clip_sets(request, model.clip, model.labels).calibration
    options = vcompress.Options(target="int8", calib=SOURCE, tokens="auto", max_drop=4.0)
    plan, _ = make_plan(model, calibration, options)
    assert plan.tokens is not None
    evidence = plan.evidence["tokens"]
    assert evidence["budget"] == {"kind": "drop_points", "limit": 2.0}
    assert evidence["changed_points"] <= 2.0
    assert evidence["flop_share"] < 0.7


def test_latency_is_that_of_the_reduced_model_over_that_of_the_model(
    model: VideoModel, found: tuple[Path, TokenSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: dict[str, np.ndarray] = {}

    def watched(
        runners: Mapping[str, Callable[[], Any]], **options: Any
    ) -> Mapping[str, LatencyStatistics]:
        outputs.update({name: np.asarray(run()) for name, run in runners.items()})
        timings = measure_interleaved(runners, **options)
        speed = timings["reduced"].speed
        assert speed is not None
        shares.append(1 / speed.median)
        return timings

    shares: list[float] = []
    monkeypatch.setattr("vcompress.pipeline.tokens.measure_interleaved", watched)
    assert latency_share(model, found[1]) == shares[0] > 0
    reduced = model.copy()
    apply_reduction(reduced, found[1])
    clip = model.example()
    np.testing.assert_allclose(outputs["model"], model(clip).numpy(), atol=1e-4)
    np.testing.assert_allclose(outputs["reduced"], reduced(clip).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("bars", "options", "expected"),
    [
        ({}, {}, "give exactly one of --max-drop.*got none"),
        ({"max_flops": 0.5}, {"max_drop": 1.0}, "got --max-drop, --max-flops"),
        ({}, {"min_sqnr": 20.0}, "classifies; use --max-drop"),
        ({"max_flops": 0.001}, {}, "no token schedule of penvideo20 gets to 0.00"),
    ],
)
def test_a_wrong_bar_says_why(
    tmp_path: Path, bars: dict[str, float], options: dict[str, float], expected: str
) -> None:
    path = tmp_path / "tokens.json"
    with pytest.raises(InputError, match=expected):
        find_tokens(
            SOURCE, path, options=vcompress.Options(calib=SOURCE, num_clips=16, **options),  # type: ignore[arg-type]
            **bars,
        )  # fmt: skip
    assert not path.exists()


def test_a_plan_without_the_section_or_the_tensors_is_refused(
    model: VideoModel, found: tuple[Path, TokenSection], tmp_path: Path
) -> None:
    data = json.loads(found[0].read_text())
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({**data, "tokens": None}))
    options = vcompress.Options(target="int8", calib=SOURCE, tokens=str(bare))
    with pytest.raises(InputError, match="no section tokens"):
        options.token_request(model.task)
    with pytest.raises(InputError, match="there is no file"):
        vcompress.Options(calib=SOURCE, tokens="half").token_request(model.task)
    with pytest.raises(InputError, match="needs a bar: add --min-sqnr"):
        vcompress.Options(calib=SOURCE, tokens="auto").token_request("embed")
    if found[1].readout is not None:
        plan, _ = read_plan(found[0])
        with pytest.raises(InputError, match="has no weights that fit classifier"):
            apply_plan(model, plan, {})
