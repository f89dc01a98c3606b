"""Allocation against exhaustive search."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from vcompress.compress.allocate import Group, Option, allocate, refine
from vcompress.spec.errors import InputError

Groups = list[Group]


def random_groups(generator: np.random.Generator, span: float, count: int = 5) -> Groups:
    """Losses over `span` decades; the last option of a group costs most and loses nothing."""
    return [
        Group(
            (f"layer{index}",),
            tuple(
                Option(
                    formats={f"layer{index}": str(option)},
                    loss=float(10 ** generator.uniform(-span, 1)) if option else 0.0,
                    cost=float(generator.integers(1, 1000)) if option else 1200.0,
                )
                for option in range(generator.integers(2, 5))
            ),
        )
        for index in range(count)
    ]


def every_choice(groups: Groups) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*[range(len(group.options)) for group in groups])


def cost_of(groups: Groups, choice: tuple[int, ...]) -> float:
    return sum(group.options[index].cost for group, index in zip(groups, choice, strict=True))


def loss_of(groups: Groups, choice: tuple[int, ...]) -> float:
    return sum(group.options[index].loss for group, index in zip(groups, choice, strict=True))


@pytest.mark.parametrize("span", [1.0, 4.0, 10.0])
def test_the_choice_is_the_best_of_all(span: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        groups = random_groups(generator, span)
        cheapest = sum(min(option.cost for option in group.options) for group in groups)
        budget = generator.uniform(cheapest, 1200 * len(groups))
        best = min(
            loss_of(groups, choice)
            for choice in every_choice(groups)
            if cost_of(groups, choice) <= budget
        )
        choice = allocate(groups, budget, what="the bits")
        assert cost_of(groups, choice) <= budget * (1 + 1e-9)
        assert loss_of(groups, choice) == pytest.approx(best, rel=1e-6)


def test_a_budget_that_is_met_exactly() -> None:
    groups = random_groups(np.random.default_rng(1), 3.0)
    for wanted in itertools.islice(every_choice(groups), 0, None, 17):
        budget = cost_of(groups, wanted)
        choice = allocate(groups, budget, what="the bits")
        assert cost_of(groups, choice) <= budget
        assert loss_of(groups, choice) <= loss_of(groups, wanted) * (1 + 1e-9)


def test_all_is_free_where_nothing_limits() -> None:
    groups = random_groups(np.random.default_rng(2), 3.0)
    assert loss_of(groups, allocate(groups, 1e9, what="the bits")) == 0
    assert allocate([], 5.0, what="the bits") == ()
    assert refine([], (), 5.0, np.zeros((0, 0))) == ()


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    groups = random_groups(np.random.default_rng(3), 3.0)
    cheapest = sum(min(option.cost for option in group.options) for group in groups)
    with pytest.raises(InputError, match=rf"^the bits must be at least {cheapest:.6g} .* got 3;"):
        allocate(groups, 3.0, what="the bits")


def interactions(generator: np.random.Generator, groups: Groups) -> npt.NDArray[np.float64]:
    losses = np.array([option.loss for group in groups for option in group.options])
    rows = generator.normal(size=(len(losses), 6)) * np.sqrt(losses)[:, None] / np.sqrt(6)
    matrix: npt.NDArray[np.float64] = 0.5 * rows @ rows.T
    np.fill_diagonal(matrix, losses)
    return matrix


def joint(matrix: npt.NDArray[np.float64], groups: Groups, choice: tuple[int, ...]) -> float:
    starts = np.cumsum([0, *[len(group.options) for group in groups]])[:-1]
    taken = starts + np.array(choice)
    return float(matrix[np.ix_(taken, taken)].sum())


def test_refining_never_costs_more_and_keeps_the_budget() -> None:
    generator = np.random.default_rng(4)
    improved, best_found = 0, 0
    for _ in range(40):
        groups = random_groups(generator, 2.0)
        cheapest = sum(min(option.cost for option in group.options) for group in groups)
        budget = generator.uniform(cheapest, 0.6 * (cheapest + 1200 * len(groups)))
        matrix = interactions(generator, groups)
        start = allocate(groups, budget, what="the bits")
        refined = refine(groups, start, budget, matrix)
        assert cost_of(groups, refined) <= budget * (1 + 1e-9)
        before, after = joint(matrix, groups, start), joint(matrix, groups, refined)
        assert after <= before
        improved += after < before
        best = min(
            joint(matrix, groups, choice)
            for choice in every_choice(groups)
            if cost_of(groups, choice) <= budget
        )
        best_found += after <= best * (1 + 1e-5)
    assert improved >= 5
    assert best_found >= 25


def test_the_solver_leaves_standard_output_alone() -> None:
    # HiGHS prints lines of its own in some searches, from C; the result of --json must be alone.
    code = (
        "import numpy as np\n"
        "from vcompress.compress.allocate import *\n"
        "generator = np.random.default_rng(1)\n"
        "groups = []\n"
        "for _ in range(300):\n"
        "    size, loss = float(generator.integers(1, 50)) * 1e4, 10 ** generator.uniform(-6, -1)\n"
        "    groups.append(Group(('',), tuple(Option(formats={}, cost=size * bits,\n"
        "        loss=loss * share * generator.uniform(.5, 2)) for share, bits in\n"
        "        ((1, 4.5), (.1, 8.25), (.09, 8.0), (.05, 8.01), (0, 32)))))\n"
        "weights = sum(group.options[4].cost for group in groups) / 32\n"
        "for bits in (5.5, 6.5, 9): allocate(groups, bits * weights, what='')\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
