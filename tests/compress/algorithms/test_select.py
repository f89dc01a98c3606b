from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vcompress.compress.algorithms.problem import (
    LayerProblem,
    Solution,
    output_error,
    split_tokens,
)
from vcompress.compress.algorithms.select import ALGORITHMS, guarded, plain, solve
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

MakeProblem = Callable[..., LayerProblem]


def fresh_tokens(problem: LayerProblem) -> torch.Tensor:
    """Tokens of the same kind that no algorithm saw: mixtures of two calibration tokens."""
    order = torch.randperm(len(problem.inputs), generator=torch.Generator().manual_seed(7))
    return (problem.inputs + problem.inputs[order]) / 2**0.5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_is_worse_than_plain_rounding(
    make_problem: MakeProblem, algorithm: str
) -> None:
    problem = make_problem("nvfp4", outlier=8.0)
    solution = solve(problem, algorithm)
    _, held_out = split_tokens(problem, 0)
    assert output_error(problem, solution, held_out) <= output_error(
        problem, plain(problem), held_out
    )


@pytest.mark.parametrize("format", FORMATS)
def test_auto_lowers_the_error_of_every_format(make_problem: MakeProblem, format: str) -> None:
    # Mixtures have the mean of the tokens only if that is zero.
    problem = make_problem(format, mean=0.0, outlier=1.0)
    solution = solve(problem, "auto")
    tokens = fresh_tokens(problem)
    error, before = (output_error(problem, answer, tokens) for answer in (solution, plain(problem)))
    # In FP8 most of the error is that of the input.
    assert error < (1.0 if FORMATS[format].element_bits == 8 else 0.9) * before
    assert "on held-out tokens" in solution.note


@pytest.mark.parametrize("algorithm", ["auto", "hadamard+svd+gptq", "smooth", "mse"])
def test_the_same_answer_twice(make_problem: MakeProblem, algorithm: str) -> None:
    first, second = (solve(make_problem(), algorithm, seed=3) for _ in range(2))
    assert (first.rotation, first.input_amax, first.note) == (
        second.rotation, second.input_amax, second.note,
    )  # fmt: skip
    assert first.tensors.keys() == second.tensors.keys()
    for part, tensor in first.tensors.items():
        assert torch.equal(tensor.float(), second.tensors[part].float())


def test_outliers_are_rotated_or_smoothed_away(make_problem: MakeProblem) -> None:
    solution = solve(make_problem("int8_token", outlier=50.0, mean=0.0), "auto")
    assert "input_smoothing" in solution.tensors or solution.rotation is not None


def test_a_costlier_answer_must_be_worth_it() -> None:
    # Nothing to smooth and nothing to rotate: all channels are alike.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-6, 7, (900, 64), generator=generator).float()
    problem = LayerProblem(
        weight=torch.randn(16, 64, generator=generator), bias=None, inputs=inputs, input_amax=6.0,
        format="int8",
    )  # fmt: skip
    assert solve(problem, "auto").rotation is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"bias": torch.full((48,), math.nan)},
        {"input_smoothing": torch.full((128,), math.nan)},
        {"input_smoothing": torch.ones(3)},
        {"low_rank_down": torch.full((4, 128), math.inf), "low_rank_up": torch.ones(48, 4)},
        {"weight_packed": torch.zeros(3, 3, dtype=torch.uint8)},
    ],
)
def test_broken_tensors_are_not_used(
    make_problem: MakeProblem, tensors: dict[str, torch.Tensor]
) -> None:
    problem = make_problem()
    broken = Solution(tensors=tensors, input_amax=problem.input_amax, note="theirs")
    answer = guarded(problem, broken, problem.inputs)
    assert answer.tensors == {}
    assert answer.note.startswith("theirs not used: no finite output")
    assert "by rounding to nearest" in answer.note


@pytest.mark.parametrize("amax", [math.nan, math.inf])
def test_a_broken_range_is_not_used(make_problem: MakeProblem, amax: float) -> None:
    problem = make_problem()
    answer = guarded(problem, Solution(input_amax=amax, note="theirs"), problem.inputs)
    assert answer.input_amax == pytest.approx(problem.input_amax, rel=1e-5)


def test_harmful_tensors_are_not_used_and_both_numbers_are_said(
    make_problem: MakeProblem,
) -> None:
    problem = make_problem()
    harmful = Solution(
        tensors={"bias": torch.full((48,), 100.0)}, input_amax=problem.input_amax, note="theirs"
    )
    answer = guarded(problem, harmful, problem.inputs)
    assert answer.tensors == {}
    error = output_error(problem, harmful, problem.inputs)
    before = output_error(problem, plain(problem), problem.inputs)
    assert answer.note == (
        f"theirs not used: error {error:.3%} on held-out tokens, {before:.3%} by rounding to "
        "nearest"
    )


def test_what_helps_is_used_as_it_is(make_problem: MakeProblem) -> None:
    problem = make_problem()
    found = solve(problem, "gptq")
    answer = guarded(problem, found, problem.inputs)
    assert answer.tensors is found.tensors


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", ["dead", "constant", "zero", "few", "two", "none", "zero weight"])
def test_unusual_inputs(make_problem: MakeProblem, algorithm: str, case: str) -> None:
    problem = make_problem(num_channels=64, num_tokens=300)
    inputs = problem.inputs.clone()
    if case == "dead":
        inputs[:, :20] = 0.0
    elif case == "constant":
        inputs[:] = inputs[:1]
    elif case == "zero":
        inputs[:] = 0.0
    elif case == "zero weight":
        problem = replace(problem, weight=torch.zeros_like(problem.weight))
    count = {"few": 20, "two": 2, "none": 0}.get(case, len(inputs))
    amax = 0.0 if case == "zero" else problem.input_amax
    problem = replace(problem, inputs=inputs[:count], input_amax=amax)
    solution = solve(problem, algorithm)
    error = output_error(problem, solution, problem.inputs)
    assert error <= 1.5 * output_error(problem, plain(problem), problem.inputs)
    assert solution.input_amax >= 0
    if case == "none" and algorithm != "max":
        assert "there are none" in solution.note


@pytest.mark.parametrize("algorithm", ["hadamard", "hadamard+gptq", "auto"])
def test_channels_that_no_rotation_divides(make_problem: MakeProblem, algorithm: str) -> None:
    problem = make_problem("int8", num_channels=52)
    assert solve(problem, algorithm).rotation is None


@pytest.mark.parametrize("algorithm", ["auto", "gptq", "svd", "smooth", "hadamard+balanced"])
def test_huge_inputs_end_in_plain_rounding_or_finite_numbers(
    make_problem: MakeProblem, algorithm: str
) -> None:
    problem = make_problem()
    problem = replace(problem, inputs=problem.inputs * 1e25, input_amax=problem.input_amax * 1e25)
    solution = solve(problem, algorithm)
    assert all(bool(part.float().isfinite().all()) for part in solution.tensors.values())


def test_tensors_made_in_inference_mode_are_taken(make_problem: MakeProblem) -> None:
    problem = make_problem()
    with torch.inference_mode():
        recorded = replace(problem, inputs=problem.inputs * 1.0)
    assert torch.equal(
        solve(recorded, "hadamard+balanced+gptq").tensors["weight_packed"],
        solve(problem, "hadamard+balanced+gptq").tensors["weight_packed"],
    )


def test_tokens_are_held_out_in_runs() -> None:
    inputs = torch.arange(120.0).unsqueeze(1).repeat(1, 16)
    problem = LayerProblem(
        weight=torch.ones(4, 16), bias=None, inputs=inputs, input_amax=119.0, format="nvfp4"
    )
    fit, held_out = split_tokens(problem, seed=1)
    assert sorted(fit.inputs[:, 0].tolist() + held_out[:, 0].tolist()) == list(range(120))
    assert len(held_out) == 40
    starts = held_out[:, 0].diff() != 1
    assert int(starts.sum()) <= 3
    assert not torch.equal(held_out, split_tokens(problem, seed=2)[1])


def test_wrong_questions_are_refused(make_problem: MakeProblem) -> None:
    problem = make_problem()
    with pytest.raises(InputError, match="unknown algorithm 'gptqq'; did you mean 'gptq'"):
        solve(problem, "gptqq")
    with pytest.raises(InputError, match=r"must be \[T, 128\]"):
        replace(problem, inputs=torch.ones(3, 4))
    with pytest.raises(InputError, match="must be finite"):
        replace(problem, inputs=problem.inputs * math.nan)
    with pytest.raises(InputError, match="divisible by 16"):
        make_problem(num_channels=40)
