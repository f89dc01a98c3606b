"""Which steps to compute: the list with the least error for its length, found by calibration.

Source: LeMiCa (Gao et al., 2025, arXiv:2511.00090), which looks for a shortest path through the
steps whose edges cost what a reuse does to the result. What we changed: reuse continues along a
line (TaylorSeer of order 1), so an edge depends on the two computed steps before it; its cost is
read off one full run by

    e(c', c, n) = |r_c + (r_c - r_c') (n - c) / (c - c') - r_n|^2

and only weighted by what an error at step n does to the result, w_n, which a few runs with one
reused step tell and the steps between them share. The path is exact for the sum of w_n e, by
dynamic programming over (c', c).

Notation: step n of N, c and c' the last computed step and the one before, r_n what the blocks add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vcompress.compress.cache.calibrate import Trajectory
from vcompress.spec.errors import InputError

__all__ = ["MAX_GAP", "cheapest_schedules", "probe_steps", "reuse_errors", "weights_of"]

# Steps in a row that may be reused: a line does not hold for longer.
MAX_GAP = 11
_NUM_PROBES = 8
Array = NDArray[np.float64]


def reuse_errors(trajectories: Sequence[Trajectory], num_steps: int) -> Array:
    """e(c', c, n) as `[N, N, N]`, mean over the trajectories, over the mean of |r|^2.

    At c' = c nothing was computed before c, and r_c stands as it is. Infinite where not
    c' <= c < n <= c + `MAX_GAP`.

    Raises:
        InputError: a trajectory lacks steps.
    """
    errors = np.full((num_steps,) * 3, np.inf)
    products = []
    for trajectory in trajectories:
        if set(trajectory.sample) < set(range(num_steps)):
            message = (
                f"a schedule for {num_steps} steps needs runs of as many, one has "
                f"{len(trajectory.sample)}; run the pipeline with the same number of steps"
            )
            raise InputError(message)
        rows = torch.stack([trajectory.sample[step] for step in range(num_steps)]).double()
        product = (rows @ rows.T).numpy()
        products.append(product / max(np.trace(product) / num_steps, 1e-30))
    mean = np.mean(products, axis=0)
    for last in range(num_steps):
        for before in range(last + 1):
            for step in range(last + 1, min(last + MAX_GAP + 1, num_steps)):
                # The line through both, less the truth, as factors of the three residuals.
                slope = 0.0 if before == last else (step - last) / (last - before)
                factors = np.array([1 + slope, -slope, -1.0])
                at = np.ix_((last, before, step), (last, before, step))
                errors[before, last, step] = max(0.0, float(factors @ mean[at] @ factors))
    return errors


def probe_steps(num_steps: int) -> tuple[int, ...]:
    """Steps whose weight is measured, each by a run that reuses this one alone."""
    spread = np.linspace(2, num_steps - 1, min(_NUM_PROBES, max(1, num_steps - 2)))
    return tuple(dict.fromkeys(round(float(step)) for step in spread))


def weights_of(measured: Mapping[int, float], errors: Array) -> Array:
    """w_n for every step from the squared errors of the result with one reused step.

    Args:
        measured: squared error of the result by the step that was reused, those of `probe_steps`.
        errors: as `reuse_errors` returns them.
    """
    num_steps = len(errors)
    steps = sorted(measured)
    logs = [
        np.log(max(measured[step], 1e-14) / max(errors[step - 2, step - 1, step], 1e-14))
        for step in steps
    ]
    weights: Array = np.exp(np.interp(np.arange(num_steps), steps, logs))
    return weights


def cheapest_schedules(errors: Array, weights: Array) -> list[tuple[float, tuple[int, ...]]]:
    """For every number of computed steps, from 1 on: the least error, and its list of steps.

    The error is infinite where so few steps cannot do.
    """
    num_steps = len(errors)
    # sums[c', c, m]: of the reused steps between the computed steps c and m.
    weighted = np.where(
        np.isfinite(errors), weights * np.where(np.isfinite(errors), errors, 0), np.inf
    )
    sums = np.full((num_steps, num_steps, num_steps + 1), np.inf)
    for last in range(num_steps):
        sums[: last + 1, last, last + 1] = 0.0
        for following in range(last + 2, min(last + MAX_GAP + 1, num_steps) + 1):
            sums[: last + 1, last, following] = (
                sums[: last + 1, last, following - 1] + weighted[: last + 1, last, following - 1]
            )
    best = np.full((num_steps, num_steps), np.inf)
    best[0, 0] = 0.0
    origins: list[NDArray[np.int64]] = []
    found = []
    for count in range(1, num_steps + 1):
        ends = best + sums[:, :, num_steps]
        before, last = divmod(int(ends.argmin()), num_steps)
        least = float(ends[before, last])
        found.append((least, _path(origins, before, last, count) if np.isfinite(least) else ()))
        # options[c', c, m]: the step m is computed next, so that c takes the place of c'.
        options = best[:, :, None] + sums[:, :, :num_steps]
        origins.append(options.argmin(axis=0))
        best = options.min(axis=0)
    return found


def _path(
    origins: Sequence[NDArray[np.int64]], before: int, last: int, count: int
) -> tuple[int, ...]:
    """The computed steps that led to (c', c)."""
    steps = [last]
    for table in reversed(origins[: count - 1]):
        steps.append(before)
        before, last = int(table[before, last]), before
    return tuple(reversed(steps))
