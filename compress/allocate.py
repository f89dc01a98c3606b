"""Choose a format for every layer under a budget: exact, then corrected for interactions.

What: a multiple-choice knapsack. Each group of layers takes one of its options; the summed loss is
smallest under an upper bound on the summed cost (bits, bytes or seconds). Solved exactly as a mixed
integer linear program by HiGHS (`scipy.optimize.milp`).

Interactions: losses of layers do not add up. `refine` takes the exact solution as its start and
exchanges options while a quadratic joint loss of the whole choice falls.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vcompress.spec.errors import InputError

__all__ = ["Group", "Option", "allocate", "refine"]

Choice = tuple[int, ...]
Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a group.

    Attributes:
        formats: layer -> format.
        loss: predicted.
        cost: what the budget limits.
    """

    formats: Mapping[str, str]
    loss: float
    cost: float


@dataclass(frozen=True)
class Group:
    """Layers that are decided together, and their options."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]


def allocate(groups: Sequence[Group], budget: float, *, what: str) -> Choice:
    """Index of the chosen option of each group: least loss at a cost of at most `budget`.

    Args:
        groups: with at least one option each.
        budget: upper bound of the summed cost.
        what: names the budget in the error, with its unit.

    Raises:
        InputError: even the cheapest options exceed the budget.
    """
    if not groups:
        return ()
    cheapest = sum(min(option.cost for option in group.options) for group in groups)
    if cheapest > budget * (1 + 1e-9):
        message = (
            f"{what} must be at least {cheapest:.6g} for this model and these formats, got "
            f"{budget:.6g}; raise it or allow a smaller format"
        )
        raise InputError(message)
    losses, costs, owner = _table(groups)
    allowed = np.ones(len(losses), dtype=bool)
    scale, best, choice = losses.max(initial=0.0), np.inf, None
    while True:
        found = _solve(losses / (scale or 1.0), costs, owner, allowed, budget)
        total = losses[found].sum()
        if choice is not None and total >= best * (1 - 1e-9):
            break
        choice, best = found, total
        # Solvers work with absolute tolerances, and losses may be 1e-9 of one another. An option
        # that costs more than this whole choice is in no better one; the others come closer.
        allowed, scale = losses <= total, total
    return _indices(choice, owner, len(groups))


def _table(groups: Sequence[Group]) -> tuple[Numbers, Numbers, Indices]:
    """Loss, cost and group of all options in order."""
    losses = np.array([option.loss for group in groups for option in group.options])
    costs = np.array([option.cost for group in groups for option in group.options])
    owner = np.repeat(np.arange(len(groups)), [len(group.options) for group in groups])
    return losses, costs, owner


def _indices(chosen: Indices, owner: Indices, num_groups: int) -> Choice:
    """Which option of its group each of the `chosen` is."""
    return tuple(int(index) for index in chosen - np.searchsorted(owner, np.arange(num_groups)))


def _solve(
    losses: Numbers, costs: Numbers, owner: Indices, allowed: npt.NDArray[np.bool_], budget: float
) -> Indices:
    """The taken option of each group, counted over all groups."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    members = [np.flatnonzero(owner == group) for group in np.unique(owner)]
    one_each = (owner[None, :] == np.unique(owner)[:, None]).astype(float)
    # The solver lets a bound be passed by its tolerance; then it is drawn in.
    for slack in (1e-9, -1e-6, -1e-5):
        with _quiet():
            result = milp(
                np.where(allowed, losses, 0.0),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(costs[None, :] / budget, -np.inf, 1 + slack),
                ],
                integrality=np.ones(len(losses)),
                bounds=Bounds(0, allowed.astype(float)),
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            break
        taken = np.array([each[np.argmax(result.x[each])] for each in members])
        if costs[taken].sum() <= budget * (1 + 1e-9):
            return taken
    # Only a budget that nothing but the cheapest options keep comes here.
    return np.array([each[np.lexsort((losses[each], costs[each]))[0]] for each in members])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away from standard output what HiGHS prints there, whatever it is told.

    It is C code that prints, into a buffer of its own.
    """
    if sys.platform == "win32":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def refine(groups: Sequence[Group], start: Choice, budget: float, interaction: Numbers) -> Choice:
    """Exchange the options of one or two groups while their joint loss falls.

    Args:
        groups: as in `allocate`.
        start: an allowed choice.
        budget: as in `allocate`.
        interaction: `[num_options, num_options]` over the options of all groups in order,
            symmetric; the joint loss of a choice is the sum of its rows and columns.
    """
    if not groups:
        return ()
    _, costs, owner = _table(groups)
    first = np.searchsorted(owner, np.arange(len(groups)))
    # Of two options of one group never both are taken.
    apart = owner[:, None] != owner[None, :]
    chosen = first + np.array(start)
    while True:
        # What each option would change alone: `loss` and `cost`, 0 for those that are taken.
        old = chosen[owner]
        pull = interaction[:, chosen].sum(1)
        loss = (
            2 * (pull - pull[old]) + np.diag(interaction) + np.diag(interaction)[old]
            - 2 * interaction[np.arange(len(owner)), old]
        )  # fmt: skip
        cost = costs - costs[old]
        slack = budget * (1 + 1e-9) - costs[chosen].sum()
        # And two of them together; on the diagonal one alone.
        cross = interaction - interaction[:, old] - interaction[old] + interaction[old][:, old]
        both = np.where(apart, loss[:, None] + loss[None, :] + 2 * cross, np.inf)
        np.fill_diagonal(both, loss)
        spent = np.where(apart, cost[:, None] + cost[None, :], cost[:, None])
        both[spent > slack] = np.inf
        best = np.unravel_index(np.argmin(both), both.shape)
        total = interaction[np.ix_(chosen, chosen)].sum()
        if not both[best] < -1e-6 * abs(total):
            return _indices(chosen, owner, len(groups))
        exchanged = chosen.copy()
        for option in best:
            exchanged[owner[option]] = option
        # Differences of large numbers are not to be trusted to the last digit.
        if not interaction[np.ix_(exchanged, exchanged)].sum() < total:
            return _indices(chosen, owner, len(groups))
        chosen = exchanged
