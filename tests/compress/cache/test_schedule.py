from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vcompress.compress.cache.calibrate import Trajectory
from vcompress.compress.cache.ladder import Probe, schedules
from vcompress.compress.cache.schedule import Runs, Scheduler, probe_steps
from vcompress.spec.errors import InputError

N = 8


def trajectory(values: torch.Tensor, generation: int = 1, first: int = 0) -> Trajectory:
    """Outputs `values` `[steps, numbers]` from step `first` on."""
    outputs = {first + at: row for at, row in enumerate(values)}
    return Trajectory(f"at {first}", "cond", generation, output=outputs)


def walks(count: int) -> list[Trajectory]:
    """Runs that are alike only in part."""
    generator = torch.Generator().manual_seed(0)
    return [
        trajectory(torch.randn(N, 5, generator=generator).cumsum(0), at + 1) for at in range(count)
    ]


def cost(runs: Runs, weights: np.ndarray, steps: tuple[int, ...]) -> float:
    """The formula, gap by gap, with the mixtures of the list."""
    mixture = runs.mixture_of(steps)
    total = 0.0
    for last, following in itertools.pairwise((*steps, N)):
        values = []
        for product in runs.products:
            apart, together = 0.0, np.zeros(N)
            for step in range(last + 1, following):
                error = np.zeros(N)
                before = [each for each in steps if each < step]
                for weight, at in zip(mixture[step], reversed(before), strict=False):
                    error[at] += weight
                error[step] -= 1
                error *= weights[step] ** 0.5
                together = together + error
                apart += error @ product @ error
            values.append((apart + together @ product @ together) / 2)
        total += float(np.mean(values) + np.std(values))
    return total


def test_a_line_is_continued_and_a_square_needs_three() -> None:
    numbers = torch.arange(1.0, N + 1)[:, None]
    straight = Runs.of([trajectory(torch.cat([numbers, torch.ones(N, 1)], dim=1))], N)
    weights = straight.mixture(np.array([[3, 1, -1]]), np.array([5]))
    assert weights[0] == pytest.approx([2, -1, 0], abs=1e-3)
    # One step alone is scaled as well as it can be: 5 is 3, less 1 for the constant.
    (alone,) = straight.mixture(np.array([[3, -1, -1]]), np.array([5]))
    assert alone[0] == pytest.approx((4 * 6 + 1) / (4 * 4 + 1), abs=1e-3)
    square = torch.cat([numbers**2, numbers, torch.ones(N, 1)], dim=1)
    (three,) = Runs.of([trajectory(square)], N).mixture(np.array([[4, 3, 2]]), np.array([6]))
    # 25, 16 and 9 go on to 49.
    assert three @ [25, 16, 9] == pytest.approx(49, rel=0.01)


def test_the_cheapest_list_of_every_length_is_the_cheapest() -> None:
    runs = Runs.of(walks(3), N)
    weights = np.linspace(1, 3, N)
    # Neighbours are not smoothed on a straight line.
    found = Scheduler(runs, dict(enumerate(weights))).cheapest()
    assert [len(one.compute_steps) for one in found] == list(range(1, N + 1))
    for one in found[1:-1]:
        count = len(one.compute_steps)
        best = min(
            cost(runs, weights, (0, *rest))
            for rest in itertools.combinations(range(1, N), count - 1)
        )
        assert one.cost == pytest.approx(best, rel=1e-3)
        assert [not row for row in one.mixture] == [at in one.compute_steps for at in range(N)]


def test_nothing_is_carried_from_one_denoiser_to_the_next() -> None:
    values = torch.randn(N, 5, generator=torch.Generator().manual_seed(1)).cumsum(0)
    runs = Runs.of([trajectory(values[:3]), trajectory(values[3:], first=3)], N)
    assert runs.starts == (0, 3)
    for one in Scheduler(runs, dict.fromkeys(range(N), 1.0)).cheapest():
        assert {0, 3} <= set(one.compute_steps)
        for step, row in enumerate(one.mixture):
            start = 3 if step >= 3 else 0
            assert len(row) <= sum(start <= each < step for each in one.compute_steps)


def test_a_rung_is_judged_by_fits_that_have_not_seen_the_clip() -> None:
    runs = Runs.of(walks(3), N)
    probes = [Probe(1 + at % 3, step, 1.0 + at) for at, step in enumerate(probe_steps(N))]
    ladder = schedules(runs, probes, [[1], [2], [3]])
    assert len(ladder.refits) == len(ladder.rungs) == N - 1
    for rung, refits in zip(ladder.rungs, ladder.refits, strict=True):
        assert {len(each.compute_steps or ()) for each in refits} == {len(rung.compute_steps or ())}
        assert len({rung, *refits}) == 4
    seen = [probe for probe in probes if probe.generation != 2]
    expected = schedules(Runs.of([each for each in walks(3) if each.generation != 2], N), seen)
    assert [each[1] for each in ladder.refits] == list(expected.rungs)


def test_runs_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="needs runs of as many"):
        Runs.of([trajectory(torch.ones(N - 1, 2))], N)
    # One that goes on for longer, but lacks a step.
    run = trajectory(torch.ones(N + 1, 2))
    del run.output[3]
    with pytest.raises(InputError, match="needs runs of as many"):
        Runs.of([run], N)
