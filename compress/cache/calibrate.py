"""What policies have to know of a model beforehand, fitted to full runs of it.

with observe(pipe.transformer) as trajectories:
    for prompt in prompts:
        pipe(prompt=prompt)
section = fit(CacheSection(policy="teacache", num_steps=50), trajectories)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vcompress.compress.cache.apply import Denoisers, denoisers_of
from vcompress.compress.cache.cached import Cached
from vcompress.compress.cache.policies.base import State
from vcompress.compress.cache.policies.observer import Observer
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import significant

__all__ = ["Trajectory", "fit", "fit_magnitudes", "fit_polynomial", "observe"]

_DEGREE = 4
# A polynomial with as many coefficients as it has points fits anything.
_POINTS_PER_COEFFICIENT = 3
_NUM_SAMPLED = 2**14


@dataclass(frozen=True)
class Trajectory:
    """One generation of one guidance branch in one denoiser, with everything computed.

    Attributes:
        denoiser, branch, generation: whose.
        change, residual, growth: by step; see `policies.observer`. They compare with the step
            before, so the denoiser's first step of the run is missing.
        output: some values of what the model returned by step, always from the same places,
            float32 `[K]`.
    """

    denoiser: str
    branch: str
    generation: int
    change: dict[int, float] = field(default_factory=dict)
    residual: dict[int, float] = field(default_factory=dict)
    growth: dict[int, float] = field(default_factory=dict)
    output: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def observe(
    modules: Denoisers, *, blocks: tuple[str, ...] = (), timestep: str | None = None
) -> Iterator[list[Trajectory]]:
    """Measure all generations that run inside; the list is filled meanwhile.

    Args:
        modules, blocks, timestep: as for `apply_cache`.
    """
    trajectories: dict[tuple[str, str, int], Trajectory] = {}
    found: list[Trajectory] = []

    def listen(
        denoiser: str, branch: str, generation: int, step: int, state: State, output: torch.Tensor
    ) -> None:
        key = (denoiser, branch, generation)
        if key not in trajectories:
            trajectories[key] = Trajectory(*key)
            found.append(trajectories[key])
            trajectories[key].output[step] = _sampled(output)
            return
        trajectories[key].output[step] = _sampled(output)
        for name in ("change", "residual", "growth"):
            getattr(trajectories[key], name)[step] = float(state[name])

    observer = Observer(num_steps=1, protect_first=0, protect_last=0)
    cached = Cached(
        "observer", denoisers_of(modules, blocks, timestep), lambda _: observer, 1,
        listener=listen,
    )  # fmt: skip
    with cached:
        yield found


def fit(section: CacheSection, trajectories: Sequence[Trajectory]) -> CacheSection:
    """`section` with what its policy learns from `trajectories`; most learn nothing.

    Raises:
        InputError: the trajectories are too short.
    """
    if section.policy == "magcache":
        return replace(section, magnitudes=fit_magnitudes(trajectories))
    if section.policy == "teacache":
        coefficients, signal_range = fit_polynomial(trajectories)
        return replace(section, coefficients=coefficients, signal_range=signal_range)
    return section


def fit_magnitudes(trajectories: Sequence[Trajectory]) -> tuple[float, ...]:
    """MagCache's table: the mean growth at each step, 1 where none was measured.

    Raises:
        InputError: nothing was measured.
    """
    measured = _all(trajectories, "growth")
    num_steps = 1 + max(step for step, _ in measured)
    means = []
    for step in range(num_steps):
        growths = [growth for at, growth in measured if at == step]
        means.append(significant(float(np.mean(growths))) if growths else 1.0)
    return tuple(means)


def fit_polynomial(
    trajectories: Sequence[Trajectory],
) -> tuple[tuple[float, ...], tuple[float, float]]:
    """TeaCache's polynomial, highest power first, and the range that it was fitted to.

    Of degree 4 where there are points enough, else lower.

    Raises:
        InputError: fewer than three points.
    """
    _all(trajectories, "change")
    points = [
        (trajectory.change[step], trajectory.residual[step])
        for trajectory in trajectories
        for step in trajectory.change
    ]
    if len(points) < _POINTS_PER_COEFFICIENT:
        message = (
            f"a polynomial needs at least {_POINTS_PER_COEFFICIENT} steps to be fitted to, got "
            f"{len(points)}; observe a longer run"
        )
        raise InputError(message)
    change, residual = np.array(points, dtype=np.float64).T
    degree = min(_DEGREE, len(set(change.tolist())) // _POINTS_PER_COEFFICIENT)
    # Changes are small numbers, whose fourth powers would be lost beside 1.
    scale = max(float(change.max()), 1e-12)
    scaled = np.polynomial.polynomial.polyfit(change / scale, residual, degree)
    coefficients = tuple(
        significant(float(value) / scale**power) for power, value in enumerate(scaled)
    )
    smallest, largest = significant(float(change.min())), significant(float(change.max()))
    return coefficients[::-1], (smallest, largest)


def _sampled(output: torch.Tensor) -> torch.Tensor:
    """Evenly spread values, float32 on the CPU."""
    flat = output.detach().flatten()
    return flat[:: -(-len(flat) // _NUM_SAMPLED)].float().cpu()


def _all(trajectories: Sequence[Trajectory], name: str) -> list[tuple[int, Any]]:
    measured = [item for trajectory in trajectories for item in getattr(trajectory, name).items()]
    if not measured:
        message = (
            "no two steps of one generation were observed; run the pipeline inside of observe()"
        )
        raise InputError(message)
    return measured
