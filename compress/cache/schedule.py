"""Which steps to compute and how to continue between them, found by calibration.

Sources: LeMiCa (Gao et al., 2025, arXiv:2511.00090), which looks for a shortest path through the
steps whose edges cost what a reuse does to the result; TaylorSeer for the continuation. What we
changed:

- A reused step is a mixture of the last three computed outputs (`policies.forecast`). Its weights
  are the least squares over all calibration runs,

      a = argmin of the mean over runs of |sum a_i y_(c_i) - y_n|^2 + ridge |a|^2

  with three numbers for tens of thousands of values, so hardly anything is learned by heart.
- An edge is a gap, from the computed step c to the next one m, and depends on the two before c.
  With d_n the error of step n and w_n the weight that an error there has in the result,

      cost = mean + spread over runs of ( |sum sqrt(w_n) d_n|^2 + sum w_n |d_n|^2 ) / 2

  The first term says that errors of one gap point the same way, the second that they do not; a list
  that lives on errors that cancel in the calibration runs would be cheap under the first alone. The
  spread, a standard deviation, is against lists that suit most runs and ruin one.
- The path is exact for the sum of these, by dynamic programming over the last three computed steps.

w_n is measured by runs in which one step alone is reused, and shared by the steps around it.

Notation: step n of N; y_n the model's output; G the products y_i . y_j of one run, over their mean
square. Steps of one denoiser make a segment: nothing is carried over to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vcompress.compress.cache.calibrate import Trajectory
from vcompress.compress.cache.policies.forecast import DEPTH
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import significant

__all__ = ["MAX_GAP", "Runs", "Schedule", "Scheduler", "probe_steps"]

# From one computed step to the next: a mixture does not hold for longer.
MAX_GAP = 8
_NUM_PROBES = 12
# Of the mean square of an output: outputs of neighbouring steps are nearly the same.
_RIDGE = 1e-6
_TINY = 1e-14
Array = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """A list of steps to compute, a mixture for every other, and what it is expected to cost."""

    compute_steps: tuple[int, ...]
    mixture: tuple[tuple[float, ...], ...]
    cost: float


@dataclass(frozen=True)
class Runs:
    """What is known of full runs.

    Attributes:
        products: G of each, `[runs, N, N]`.
        generations: whose, from 1.
        starts: first step of every denoiser.
    """

    products: Array
    generations: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], num_steps: int) -> Runs:
        """Denoisers that take turns are put together, branches are runs of their own.

        Raises:
            InputError: a run lacks steps.
        """
        outputs: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        starts = set()
        for one in trajectories:
            outputs.setdefault((one.branch, one.generation), {}).update(one.output)
            starts.add(min(one.output, default=0))
        products = []
        for rows in outputs.values():
            if not set(rows) >= set(range(num_steps)):
                message = (
                    f"a schedule for {num_steps} steps needs runs of as many, one has "
                    f"{len(rows)}; run the pipeline with the same number of steps"
                )
                raise InputError(message)
            stacked = torch.stack([rows[step] for step in range(num_steps)]).double()
            product = (stacked @ stacked.T).numpy()
            products.append(product / max(np.trace(product) / num_steps, 1e-30))
        generations = tuple(generation for _, generation in outputs)
        return cls(np.stack(products), generations, tuple(sorted(starts)))

    @property
    def num_steps(self) -> int:
        """N."""
        return int(self.products.shape[1])

    def without(self, generations: Sequence[int]) -> Runs:
        """All but those of `generations`; all if no others are left."""
        kept = [index for index, one in enumerate(self.generations) if one not in generations]
        if not kept:
            return self
        return Runs(self.products[kept], tuple(self.generations[index] for index in kept),
                    self.starts)  # fmt: skip

    def mixture(self, history: Integers, step: Integers) -> Array:
        """Weights `[H, DEPTH]` of histories `[H, DEPTH]`, newest first, -1 for none, at `step`."""
        mean = self.products.mean(axis=0)
        there = history >= 0
        inside = mean[history[:, :, None], history[:, None, :]]
        inside = np.where(there[:, :, None] & there[:, None, :], inside, 0.0)
        ridge = _RIDGE * np.eye(DEPTH) + np.where(there, 0.0, 1.0)[:, :, None] * np.eye(DEPTH)
        right = np.where(there, mean[history, step[:, None]], 0.0)
        solved = np.linalg.solve(inside + ridge, right[:, :, None])[:, :, 0]
        weights: Array = solved.astype(np.float64)
        return weights

    def mixture_of(self, compute_steps: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """The mixture of every step of a list that is not on it."""
        computed = set(compute_steps)
        rows: list[tuple[float, ...]] = []
        for step in range(self.num_steps):
            start = max(each for each in self.starts if each <= step)
            recent = [each for each in compute_steps if start <= each < step][: -DEPTH - 1 : -1]
            if step in computed or not recent:
                rows.append(())
                continue
            history = np.array([[*recent, *(-1,) * (DEPTH - len(recent))]])
            (weights,) = self.mixture(history, np.array([step]))
            rows.append(tuple(significant(float(w)) for w in weights[: len(recent)]))
        return tuple(rows)

    def error(self, step: int, generation: int) -> float:
        """|d_n|^2 where step `step` alone is reused, mean over the runs of `generation`."""
        start = max(each for each in self.starts if each <= step)
        recent = [each if each >= start else -1 for each in range(step - 1, step - 1 - DEPTH, -1)]
        (weights,) = self.mixture(np.array([recent]), np.array([step]))
        vector = np.zeros(self.num_steps)
        vector[step] = -1.0
        for place, weight in zip(recent, weights, strict=True):
            if place >= 0:
                vector[place] = weight
        own = [at for at, one in enumerate(self.generations) if one == generation]
        return float(np.mean([vector @ self.products[at] @ vector for at in own]))


def probe_steps(num_steps: int, starts: Sequence[int] = (0,)) -> tuple[int, ...]:
    """Steps whose weight is measured, each by a run that reuses this one alone."""
    spread = np.linspace(1, num_steps - 1, min(_NUM_PROBES, max(1, num_steps - 1)))
    return tuple(dict.fromkeys(round(float(step)) for step in spread if round(step) not in starts))


class Scheduler:
    """Finds the cheapest schedule of every length."""

    def __init__(self, runs: Runs, measured: Mapping[int, float]) -> None:
        """With w_n `measured` at some steps: squared error of the result over |d_n|^2."""
        self._runs, self.num_steps = runs, runs.num_steps
        steps = sorted(measured)
        logs = np.log([max(measured[step], _TINY) for step in steps])
        # One clip a probe: neighbours put a lucky one right.
        smooth = [float(np.median(logs[max(0, at - 1) : at + 2])) for at in range(len(logs))]
        if len(smooth) > 2:
            smooth[0], smooth[-1] = float(logs[0]), float(logs[-1])
        self._weights: Array = np.exp(np.interp(np.arange(self.num_steps), steps, smooth))
        self._edges()

    def cheapest(self) -> list[Schedule]:
        """For every number of computed steps that can do, the cheapest, shortest first."""
        states = len(self._histories)
        best = np.full(states + 1, np.inf)
        best[0] = 0.0
        origins: list[Integers] = []
        found = []
        for _ in range(self.num_steps):
            costs = best[self._sources] + self._costs
            following = np.full(states + 1, np.inf)
            np.minimum.at(following, self._targets, costs)
            origin = np.full(states + 1, -1)
            chosen = np.isfinite(costs) & (costs == following[self._targets])
            origin[self._targets[chosen]] = self._sources[chosen]
            origins.append(origin)
            # The last state is the end of the run.
            if np.isfinite(following[states]):
                steps = self._path(origins, states)
                found.append(
                    Schedule(steps, self._runs.mixture_of(steps), float(following[states]))
                )
            best = following
            best[states] = np.inf
        return found

    def _path(self, origins: Sequence[Integers], end: int) -> tuple[int, ...]:
        steps, state = [], int(origins[-1][end])
        for origin in reversed(origins[:-1]):
            steps.append(int(self._histories[state][0]))
            state = int(origin[state])
        steps.append(int(self._histories[state][0]))
        return tuple(reversed(steps))

    def _edges(self) -> None:
        """All histories, and from each the gaps to what may be computed next, with their costs."""
        starts = self._runs.starts
        ends = [*starts[1:], self.num_steps]
        number: dict[tuple[int, ...], int] = {}
        queue: list[tuple[int, ...]] = [(0, *(-1,) * (DEPTH - 1))]
        number[queue[0]] = 0
        edges = []
        for history in queue:
            last = history[0]
            end = next(each for each in ends if each > last)
            for gap in range(1, min(MAX_GAP, end - last) + 1):
                after = last + gap
                target: tuple[int, ...] | None
                if after == self.num_steps:
                    target = None
                elif after == end:
                    target = (after, *(-1,) * (DEPTH - 1))
                else:
                    target = (after, *history[:-1])
                if target is not None and target not in number:
                    number[target] = len(queue)
                    queue.append(target)
                edges.append((number[history], target, gap))
        self._histories: Integers = np.array(queue)
        self._sources: Integers = np.array([edge[0] for edge in edges])
        self._targets: Integers = np.array(
            [len(queue) if edge[1] is None else number[edge[1]] for edge in edges]
        )
        by_gap = self._gap_costs()
        gaps = np.array([edge[2] for edge in edges])
        self._costs: Array = by_gap[gaps, self._sources]

    def _gap_costs(self) -> Array:
        """`[MAX_GAP + 1, H]`: the cost of going on with the step so far behind the last one."""
        histories, products = self._histories, self._runs.products
        count = len(histories)
        costs = np.zeros((MAX_GAP + 1, count))
        together = np.zeros((count, self.num_steps))
        apart = np.zeros((len(products), count))
        every = np.arange(count)
        for gap in range(1, MAX_GAP):
            step = np.minimum(histories[:, 0] + gap, self.num_steps - 1)
            weights = self._runs.mixture(histories, step)
            error = np.zeros((count, self.num_steps))
            for place in range(DEPTH):
                there = histories[:, place] >= 0
                error[every[there], histories[there, place]] += weights[there, place]
            error[every, step] -= 1.0
            error *= np.sqrt(self._weights[step])[:, None]
            together = together + error
            sums = np.empty_like(apart)
            for run, product in enumerate(products):
                apart[run] += ((error @ product) * error).sum(axis=1)
                sums[run] = ((together @ product) * together).sum(axis=1)
            mixed = (apart + sums) / 2
            costs[gap + 1] = mixed.mean(axis=0) + mixed.std(axis=0)
        return costs
