from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vcompress.compress.cache.calibrate import Trajectory
from vcompress.compress.cache.schedule import (
    cheapest_schedules,
    probe_steps,
    reuse_errors,
    weights_of,
)
from vcompress.spec.errors import InputError

N = 9


def trajectory(values: torch.Tensor) -> Trajectory:
    """Residuals of one value a step."""
    return Trajectory("", "cond", 1, sample={n: values[n : n + 1] for n in range(len(values))})


def cost(errors: np.ndarray, weights: np.ndarray, steps: tuple[int, ...]) -> float:
    """The formula, step by step."""
    total = 0.0
    for step in set(range(N)) - set(steps):
        done = [each for each in steps if each < step]
        before = done[-2] if len(done) > 1 else done[-1]
        total += weights[step] * errors[before, done[-1], step]
    return total


def test_a_line_is_continued_and_a_square_is_not() -> None:
    straight = reuse_errors([trajectory(torch.arange(1.0, N + 1))], N)
    assert straight[0, 1, 5] == pytest.approx(0.0, abs=1e-9)
    # One step alone stands as it is: from 1 to 4, over the mean square of 1..9.
    assert straight[0, 0, 3] == pytest.approx(3.0**2 / (285 / 9))
    square = reuse_errors([trajectory(torch.arange(N) ** 2.0)], N)
    scale = sum(n**4 for n in range(N)) / N
    # At 3 and 4 the line says 16 + 7 * 2, the square 36.
    assert square[3, 4, 6] == pytest.approx((36 - 30) ** 2 / scale)
    assert np.isinf(square[3, 4, 4])
    assert np.isinf(square[5, 4, 6])


def test_the_cheapest_list_of_every_length_is_the_cheapest() -> None:
    values = torch.randn(N, generator=torch.Generator().manual_seed(0)).cumsum(0)
    errors = reuse_errors([trajectory(values)], N)
    weights = np.linspace(1, 3, N)
    found = cheapest_schedules(errors, weights)
    assert len(found) == N
    for count, (error, steps) in enumerate(found, start=1):
        best = min(
            (cost(errors, weights, (0, *rest)), (0, *rest))
            for rest in itertools.combinations(range(1, N), count - 1)
        )
        assert error == pytest.approx(best[0], abs=1e-12)
        assert len(steps) == count
        assert cost(errors, weights, steps) == pytest.approx(best[0], abs=1e-12)


def test_weights_pass_through_what_was_measured() -> None:
    errors = reuse_errors([trajectory(torch.arange(N) ** 2.0)], N)
    probes = probe_steps(N)
    assert probes[0] == 2
    assert probes[-1] == N - 1
    weights = weights_of({n: 4.0 * errors[n - 2, n - 1, n] for n in probes}, errors)
    assert weights == pytest.approx(np.full(N, 4.0))


def test_runs_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="needs runs of as many"):
        reuse_errors([trajectory(torch.ones(N - 1))], N)
