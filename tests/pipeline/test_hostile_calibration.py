"""Constant activations, dead channels, layers that no clip or few clips reach: a plan, a reason."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vcompress
from vcompress.calib.clips import Clips
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.spec.errors import InputError
from vcompress.spec.plan import LayerFacts


class Hostile(nn.Module):
    def __init__(self, broken: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.broken = broken
        self.first, self.constant, self.zeros, self.dead, self.head = (
            nn.Linear(64, 64) for _ in range(5)
        )
        self.rare, self.never = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.first(clips.flatten(3).mean((1, 2)))
        x = x + self.constant(torch.full_like(x, 3.0)) + self.zeros(torch.zeros_like(x))
        gate = torch.ones(64)
        gate[::4] = 0
        x = x + self.dead(x * gate)
        if float(clips.amax()) > 50:
            x = x + self.rare(x)
        if float(clips.amax()) > 1e6:
            x = x + self.never(x)
        if self.broken and float(clips.amax()) > 50:
            x = x * self.broken
        return self.head(x)


def opened(broken: float = 0.0) -> tuple[VideoModel, Clips]:
    """The model, and clips of which the 10th of 24 alone is bright."""
    load = LoadOptions(input_spec="NCTHW:float32:1x3x4x8x8")
    model = wrap_module(Hostile(broken), name="hostile", options=load)
    facts = LayerFacts(kind="linear", weight_shape=(64, 64))
    model = dataclasses.replace(
        model, layers={**model.layers, "rare": facts, "never": facts}
    )  # fmt: skip
    data = np.random.default_rng(0).normal(size=(24, 3, 4, 8, 8)).astype("f4")
    data[10] *= 100
    return model, Clips.from_array(data, model.clip)


@pytest.mark.parametrize("algorithm", ["max", "auto", "svd+gptq"])
@pytest.mark.parametrize("target", ["nvfp4", "int4", "mixed"])
def test_every_layer_has_a_reason_and_the_plan_works(target: str, algorithm: str) -> None:
    model, clips = opened()
    options = vcompress.Options(
        target=target, calib="clips", algorithm=algorithm, max_layer_error=5.0,
        budget_bits=None if target != "mixed" else 33.0 if "svd" in algorithm else 6.0,
    )  # fmt: skip
    if target == "mixed":
        # The layers that a loaded model has are those that an example reaches.
        layers = {name: facts for name, facts in model.layers.items() if name != "rare"}
        model = dataclasses.replace(model, layers=layers)
    plan, tensors = make_plan(model, clips, options)
    assert list(plan.quantize) == list(model.layers)
    assert all(choice.reason for choice in plan.quantize.values())
    assert plan.quantize["never"].format == "keep"
    assert plan.quantize["never"].reason == "no calibration clip reached this layer"
    assert "never" not in tensors
    plan.to_json()
    batch = torch.from_numpy(next(clips.batches(24)))
    result = apply_plan(model, plan, tensors)(batch)
    assert bool(result.isfinite().all())
    if target != "mixed":
        assert plan.quantize["zeros"].format != "keep"
        assert plan.quantize["dead"].format != "keep"
        assert plan.quantize["rare"].format == "keep"
        assert "clips that errors are measured on do not reach" in plan.quantize["rare"].reason


def test_a_clip_with_nan_is_left_out_and_the_plan_says_so(tmp_path: Path) -> None:
    model, clips = opened()
    data = clips.data[:9].copy()
    data[4, 0, 0, 0, 0] = math.nan
    np.savez(tmp_path / "clips.npz", clips=data, names=[f"take {number}" for number in range(9)])
    spec = model.clip
    for data_path in (None, str(tmp_path / "clips.npz")):
        request = ClipRequest(
            calib=str(tmp_path / "clips.npz"), data=data_path, num_clips=6, num_test_clips=6, seed=0
        )
        if data_path is not None:
            np.savez(tmp_path / "others.npz", clips=clips.data[11:])
            request = dataclasses.replace(request, data=str(tmp_path / "others.npz"))
        sets = open_clip_sets(request, spec, ())
        options = vcompress.Options(target="int8", calib="clips.npz", max_layer_error=5.0)
        plan, _ = make_plan(model, sets.calibration, options)
        assert plan.evidence["skipped_clips"] == {"take 4": "holds NaN or infinity"}
        assert plan.evidence["num_clips"] == 6
        plan.to_json()


def test_activations_that_are_not_finite_name_their_layer() -> None:
    for broken in (math.nan, math.inf):
        model, clips = opened(broken)
        options = vcompress.Options(target="mixed", calib="clips", budget_bits=6.0)
        with pytest.raises(InputError, match="the input of layer head holds NaN or infinity"):
            make_plan(model, clips, options)
