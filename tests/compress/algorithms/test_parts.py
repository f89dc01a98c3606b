from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vcompress.compress.algorithms import rotation
from vcompress.compress.algorithms.bias import corrected_bias
from vcompress.compress.algorithms.gptq import gptq, shifted_target
from vcompress.compress.algorithms.low_rank import low_rank_branch, with_fitted_branch
from vcompress.compress.algorithms.problem import LayerProblem
from vcompress.compress.algorithms.rounding import GRIDS, largest_scales, round_weight
from vcompress.compress.algorithms.smoothing import RULES, balanced
from vcompress.compress.algorithms.working import Working, working_form

MakeProblem = Callable[..., LayerProblem]


def centred_error(working: Working, values: torch.Tensor) -> float:
    """Squared error of the output on the tokens that were fitted, without its mean."""
    error = working.inputs @ working.weight.t() - working.rounded @ values.t()
    return float((error - error.mean(0)).square().sum())


def nearest(working: Working) -> torch.Tensor:
    scales = largest_scales(working.weight, working.problem.format)
    return round_weight(working.weight, scales)


@pytest.mark.parametrize("format", GRIDS)
def test_gptq_lowers_the_error_of_the_output(make_problem: MakeProblem, format: str) -> None:
    working = working_form(make_problem(format))
    values, scales = gptq(working)
    assert torch.equal(round_weight(values, scales), values)
    # In fp8 and mxfp8 most of the error is that of the input.
    assert centred_error(working, values) < 0.95 * centred_error(working, nearest(working))


def test_gptq_beats_rounding_by_far_where_inputs_are_exact(make_problem: MakeProblem) -> None:
    working = working_form(make_problem("int4_g32", mean=0.0))
    values, _ = gptq(working, num_sweeps=0)
    assert centred_error(working, values) < 0.5 * centred_error(working, nearest(working))
    swept, _ = gptq(working, num_sweeps=2)
    assert centred_error(working, swept) < centred_error(working, values)


def test_the_shifted_target_makes_up_for_rounded_inputs(make_problem: MakeProblem) -> None:
    working = working_form(make_problem("nvfp4"))
    shifted = shifted_target(working.weight, working.folds, working.moments)
    assert centred_error(working, shifted) < centred_error(working, working.weight)


def test_exact_inputs_leave_the_target_alone(make_problem: MakeProblem) -> None:
    working = working_form(make_problem("int4_g64"))
    shifted = shifted_target(working.weight, working.folds, working.moments)
    assert torch.equal(shifted, working.weight)


def test_the_bias_takes_the_mean_error(make_problem: MakeProblem) -> None:
    problem = make_problem("nvfp4", mean=2.0)
    working = working_form(problem)
    values = nearest(working)
    bias = corrected_bias(working, values)
    output = working.rounded @ values.t() + bias
    assert problem.bias is not None
    expected = problem.inputs @ problem.weight.t() + problem.bias
    torch.testing.assert_close(output.mean(0), expected.mean(0), rtol=1e-4, atol=1e-3)


def test_a_layer_without_bias_gets_one(make_problem: MakeProblem) -> None:
    working = working_form(make_problem("nvfp4", bias=False, mean=2.0))
    assert corrected_bias(working, nearest(working)).abs().max() > 1e-3


def test_rotation_and_smoothing_do_not_change_the_product(make_problem: MakeProblem) -> None:
    problem = make_problem("nvfp4")
    branch = (torch.randn(4, 128), torch.randn(48, 4))
    smoothing = balanced(problem)
    working = working_form(problem, rotation=64, smoothing=smoothing, low_rank=branch)
    output = working.inputs @ working.weight.t()
    output += (problem.inputs * smoothing) @ branch[0].t() @ branch[1].t()
    torch.testing.assert_close(output, problem.inputs @ problem.weight.t(), rtol=1e-3, atol=1e-2)


def test_the_range_of_a_rotated_input_covers_all_of_calibration(make_problem: MakeProblem) -> None:
    problem = make_problem("nvfp4")
    seen = LayerProblem(
        weight=problem.weight, bias=None, inputs=problem.inputs,
        input_amax=2 * problem.input_amax, format="nvfp4",
    )  # fmt: skip
    working = working_form(seen, rotation=16)
    assert working.input_amax == pytest.approx(2 * float(working.inputs.abs().amax()))


@pytest.mark.parametrize(
    ("channels", "expected"), [(384, (16, 32, 64, 128)), (48, (16,)), (20, ())]
)
def test_rotation_sizes_divide(channels: int, expected: tuple[int, ...]) -> None:
    assert rotation.sizes(channels) == expected
    assert rotation.largest_size(channels) == (expected[-1] if expected else None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [None, 32])
def test_smoothing_lowers_the_error_of_int8_with_outliers(
    make_problem: MakeProblem, rule: str, size: int | None
) -> None:
    problem = make_problem("int8", outlier=50.0, mean=0.0)
    factors = RULES[rule](problem, size)
    assert bool((factors.isfinite() & (factors > 0)).all())
    smooth = working_form(problem, rotation=size, smoothing=factors)
    plain = working_form(problem, rotation=size)
    assert centred_error(smooth, nearest(smooth)) < 0.7 * centred_error(plain, nearest(plain))


def test_balanced_is_the_best_split_by_its_own_bound(make_problem: MakeProblem) -> None:
    problem = make_problem("nvfp4")
    inputs = problem.inputs.square().mean(0)
    weights = problem.weight.square().mean(0)

    def bound(factors: torch.Tensor) -> float:
        squares = factors.square()
        return float((squares * inputs).sum() * (weights / squares).sum())

    best = bound(balanced(problem))
    # Cauchy and Schwarz: the smallest value is (sum of rms(x) rms(w))^2.
    assert best == pytest.approx(float((inputs * weights).sqrt().sum() ** 2), rel=1e-3)
    for factors in (torch.ones(128), inputs.pow(-0.5), torch.rand(128) + 0.5):
        assert bound(factors) > best


@pytest.mark.parametrize("size", [None, 64])
def test_the_branch_takes_over_what_is_hard_to_round(
    make_problem: MakeProblem, size: int | None
) -> None:
    problem = make_problem("nvfp4", outlier=1.0)
    branch = low_rank_branch(problem, None, rank=16)
    assert [tuple(part.shape) for part in branch] == [(16, 128), (48, 16)]
    working = working_form(problem, rotation=size, low_rank=branch)
    values = nearest(working)
    plain = working_form(problem, rotation=size)
    error = centred_error(working, values)
    assert error < 0.6 * centred_error(plain, nearest(plain))
    fitted = with_fitted_branch(working, values)
    assert centred_error(fitted, values) < 0.9 * error
    assert fitted.low_rank is not None
    down, up = fitted.low_rank
    output = fitted.inputs @ fitted.weight.t() + problem.inputs @ down.t() @ up.t()
    torch.testing.assert_close(output, problem.inputs @ problem.weight.t(), rtol=1e-3, atol=1e-2)


def test_the_branch_is_no_larger_than_the_layer(make_problem: MakeProblem) -> None:
    down, up = low_rank_branch(make_problem("nvfp4", num_outputs=8), None, rank=32)
    assert (tuple(down.shape), tuple(up.shape)) == ((8, 128), (8, 8))
