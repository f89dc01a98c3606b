"""Algorithms are used where they help and only there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.compress import precision
from vcompress.compress.algorithms.problem import Solution
from vcompress.compress.block_error import recorded_inputs
from vcompress.compress.calibration import (
    ALGORITHMS,
    calibrate_layers,
    check_algorithm,
    extra_bits,
    fit_to_all,
    freeze_solutions,
)
from vcompress.compress.context import PlanContext
from vcompress.compress.precision import plan_precision
from vcompress.compress.quantize import apply_choices, candidate_formats
from vcompress.compress.whole_model import without_harm
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.plan import LayerChoice

MakeClips = Callable[..., Clips]
MakeContext = Callable[..., PlanContext]


def two_kinds(model: VideoModel, count: int, odd: tuple[int, ...]) -> Clips:
    """Clips of two kinds that have nothing in common: a bright half, left or (in `odd`) right."""
    generator = np.random.default_rng(0)
    data = 0.01 * generator.normal(size=(count, *model.clip.input_shape))
    for index in range(count):
        half = slice(4, 8) if index in odd else slice(0, 4)
        size = 30.0 if index in odd else 1.0
        data[index, :, :, :, half] += size * generator.normal(size=(3, 4, 8, 4))
    return Clips.from_array(data.astype("f4"), model.clip)


def test_a_recipe_that_is_worse_on_other_tokens_is_not_used(
    transformer: VideoModel, make_context: MakeContext
) -> None:
    # The clips that judge, every third, are of a kind that the recipe was not fitted to.
    clips = two_kinds(transformer, 24, tuple(range(1, 24, 3)))
    context = make_context(transformer, clips, target="nvfp4", algorithm="smooth")
    plan = plan_precision(transformer, context)
    # The whole model is worse, too; each line says what became of its layer.
    assert "with smooth on 8 calibration clips" in str(plan.evidence["calibration"])
    refused = [name for name, line in plan.choices.items() if "not used: error" in line.reason]
    assert refused
    for name in refused:
        assert plan.choices[name].tensors == ()
        assert plan.choices[name].rotation is None
        assert plan.choices[name].input_amax == pytest.approx(
            context.stats.input_amax[name], rel=1e-5
        )
        assert name not in plan.tensors
        assert "by rounding to nearest" in plan.choices[name].reason


def test_solutions_that_harm_the_whole_model_are_dropped(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    warnings: list[str] = []
    context = make_context(
        transformer, make_clips(transformer, 16), target="nvfp4", algorithm="svd",
        warnings=warnings,
    )  # fmt: skip
    formats = candidate_formats(transformer, context.target)
    good = calibrate_layers(transformer, formats, context)
    kept, line = without_harm(transformer, formats, good, context)
    assert kept is good
    assert line is not None
    assert warnings == []
    # One layer does harm: of two that were changed the one that gains more stays, if it helps.
    harm = {"bias": torch.linspace(-1e3, 1e3, 32)}
    plain = calibrate_layers(
        transformer, formats, dataclasses.replace(context, algorithm="max")
    )  # fmt: skip
    name = "blocks.0.query"
    bad = {**plain, name: dataclasses.replace(plain[name], tensors=harm, gain=0.5)}
    pair = {"head": good["head"], name: bad[name]}
    partly, line = without_harm(transformer, formats, pair, context)
    assert partly["head"] is good["head"]
    assert partly[name].tensors == {}
    assert partly[name].note == "svd not used: the whole model is not better with it"
    assert partly[name].input_amax == pytest.approx(context.stats.input_amax[name], rel=1e-5)
    assert warnings.pop() == f"{line}: the other layers are rounded plainly"
    for poison in (1e3, 1e30):
        harm = {"bias": torch.linspace(-poison, poison, 32)}
        bad = {**plain, name: dataclasses.replace(plain[name], tensors=harm)}
        dropped, line = without_harm(transformer, formats, bad, context)
        assert not any(each.tensors for each in dropped.values())
        assert warnings.pop() == f"{line}: every layer is rounded plainly"


class Root(nn.Module):
    """A root that rounding to NVFP4 makes one of a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1, bias=False)
        # 0.1; with -5.2 rounded to -6 and -0.7 to -0.5 it is -0.5.
        self.head.weight.data = torch.tensor([[6.0, -5.2, -0.7, *[0.0] * 13]])

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.head(1 + 0 * clips.flatten(1)[:, :16]).sqrt()


@pytest.mark.parametrize("algorithm", ["auto", "gptq"])
def test_what_mends_a_model_that_plain_rounding_breaks_is_used(
    wrap: Callable[..., VideoModel], make_clips: MakeClips, make_context: MakeContext,
    algorithm: str,
) -> None:  # fmt: skip
    model = wrap(Root())
    context = make_context(model, make_clips(model, 6), target="nvfp4", algorithm=algorithm)
    amax = context.stats.input_amax["head"]
    plain = Solution(input_amax=amax, note="")
    broken = freeze_solutions(model, {"head": "nvfp4"}, {"head": plain})["head"]
    assert broken(torch.ones(1, 16)) == pytest.approx(-0.5)
    mended = {"head": dataclasses.replace(plain, tensors={"bias": torch.tensor([0.6])})}
    kept, line = without_harm(model, {"head": "nvfp4"}, mended, context)
    assert kept is mended
    assert line is not None
    assert "inf with plain rounding" in line


def test_a_rotation_taken_out_by_hand_leaves_a_line_that_works(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips = make_clips(transformer, 6)
    context = make_context(transformer, clips, target="nvfp4", algorithm="hadamard+balanced+gptq")
    formats = candidate_formats(transformer, context.target)
    name = "blocks.1.narrow"
    solution = calibrate_layers(transformer, {name: formats[name]}, context)[name]
    assert solution.rotation is not None
    found = precision._made(
        {name: LayerChoice(format="nvfp4", reason="", input_amax=context.stats.input_amax[name])},
        {name: solution}, {},
    )  # fmt: skip
    line = found.choices[name].as_dict()
    assert line["rotated_amax"] == solution.input_amax
    assert line["input_amax"] == pytest.approx(context.stats.input_amax[name], rel=1e-5)
    layer, inputs = transformer.layer(name), torch.from_numpy(clips.data)
    seen = recorded_inputs(transformer, {name}, inputs)[name].arguments[0]
    for keep, kept in (([], "input_amax"), (["input_smoothing"], "smoothed_amax")):
        edited = {**line, "tensors": keep, "format": "int8"}
        del edited["rotation"]
        choice = LayerChoice.from_dict(edited, name)
        assert choice.rounded_amax == line[kept]
        changed = transformer.copy()
        apply_choices(changed, {name: choice}, found.tensors)
        error = changed.layer(name)(seen) - layer(seen)
        assert error.square().mean() < 3e-3 * layer(seen).square().mean()


def test_one_clip_cannot_be_held_out(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    warnings: list[str] = []
    context = make_context(
        transformer, make_clips(transformer, 1), target="nvfp4", algorithm="auto",
        warnings=warnings,
    )  # fmt: skip
    formats = candidate_formats(transformer, context.target)
    solutions = calibrate_layers(transformer, formats, context)
    assert not any(each.tensors or each.rotation for each in solutions.values())
    assert "a second calibration clip" in warnings.pop()
    # What was asked for by name is done all the same.
    named = dataclasses.replace(context, algorithm="gptq")
    solutions = calibrate_layers(transformer, formats, named)
    assert any(each.tensors for each in solutions.values())
    _, line = without_harm(transformer, formats, solutions, named)
    assert line is not None
    assert "on 1 calibration clips" in line


def test_what_was_accepted_is_fitted_to_the_clips_that_judged_it_too(
    transformer: VideoModel, make_context: MakeContext
) -> None:
    # Every third clip, the ones that judge, is of another kind.
    clips = two_kinds(transformer, 24, tuple(range(1, 24, 3)))
    context = make_context(transformer, clips, target="nvfp4", algorithm="gptq")
    name = "blocks.0.query"
    formats = {name: "nvfp4", "head": "nvfp4"}
    first = calibrate_layers(transformer, formats, context)
    plain = dataclasses.replace(first["head"], tensors={}, rotation=None, note="not used")
    final = fit_to_all(transformer, formats, {**first, "head": plain}, context)
    assert final["head"] is plain
    assert final[name].note == f"{first[name].note}; then fitted to all 24 clips"
    inputs = torch.from_numpy(clips.data)
    seen = recorded_inputs(transformer, {name}, inputs)[name].arguments[0]
    exact = transformer.layer(name)(seen)
    errors = [
        float((freeze_solutions(transformer, formats, {name: each})[name](seen) - exact).norm())
        for each in (first[name], final[name])
    ]
    assert errors[1] < errors[0]
    # With one clip nothing was held out.
    alone = dataclasses.replace(context, calibration=clips.subset([0]))
    assert fit_to_all(transformer, formats, first, alone) == first


def test_plain_rounding_has_nothing_to_compare(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    context = make_context(transformer, make_clips(transformer, 8), target="int8")
    formats = candidate_formats(transformer, context.target)
    solutions = calibrate_layers(transformer, formats, context)
    assert set(solutions) == set(transformer.layers)
    assert without_harm(transformer, formats, solutions, context) == (solutions, None)


def test_an_unknown_algorithm_is_refused_and_a_near_one_named() -> None:
    with pytest.raises(InputError, match=r"unknown algorithm 'gptg'.*gptq.*choose one of: max"):
        check_algorithm("gptg")
    for name in ALGORITHMS:
        check_algorithm(name)


@pytest.mark.parametrize("algorithm", ["auto", "gptq", "svd16+gptq", "hadamard+svd+gptq", "max"])
@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_no_algorithm_adds_more_than_it_was_said_to(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext, algorithm: str,
    format: str,
) -> None:  # fmt: skip
    context = make_context(transformer, make_clips(transformer, 8), algorithm=algorithm)
    names = ("blocks.0.wide", "head", "patches")
    formats = {
        name: format if transformer.layers[name].objection(format) is None else "fp8"
        for name in names
    }
    solutions = calibrate_layers(transformer, formats, context)
    for name, frozen in freeze_solutions(transformer, formats, solutions).items():
        most = extra_bits(transformer, name, formats[name], algorithm)
        assert frozen.extra_bits <= most
        assert frozen.weight_bits == FORMATS[formats[name]].weight_bits(
            transformer.layers[name].weight_shape
        )
    assert extra_bits(transformer, "patches", "int8", algorithm) == 0
    assert extra_bits(transformer, "head", "keep", algorithm) == 0


def test_what_an_algorithm_adds_is_within_the_budget(
    transformer: VideoModel, make_clips: MakeClips, make_context: MakeContext
) -> None:
    clips = make_clips(transformer, 16)
    for algorithm, bits in (("auto", 7.0), ("svd16+gptq", 29.0)):
        context = make_context(
            transformer, clips, algorithm=algorithm, budget=Budget("effective_bits", bits)
        )
        plan = plan_precision(transformer, context)
        search = plan.evidence["search"]
        assert isinstance(search, dict)
        assert 0.6 * bits < search["effective_bits"] <= bits
        if algorithm == "auto":
            # Of layers as small as these, factors cost more bits than they are worth.
            assert not any("input_smoothing" in line.tensors for line in plan.choices.values())
