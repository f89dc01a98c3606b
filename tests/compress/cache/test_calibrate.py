"""What policies learn from full runs, on denoisers whose laws are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vcompress.compress.cache import CacheSection, Trajectory, apply_cache, fit, observe
from vcompress.compress.cache.policies.magcache import resampled
from vcompress.compress.cache.policies.teacache import polynomial
from vcompress.spec.errors import InputError


def test_observed_runs_compute_everything_and_measure_the_laws(ramp: Any) -> None:
    module = ramp([1, 1.1, 1.1, 2.2])
    with observe(module) as trajectories:
        assert module.run() == "3333"
        module.run()
    assert [(each.branch, each.generation) for each in trajectories] == [
        ("call 1", 1), ("call 1", 2),
    ]  # fmt: skip
    for each in trajectories:
        assert each.change == pytest.approx({1: 0.1, 2: 0, 3: 1}, abs=1e-6)
        assert each.residual == pytest.approx({1: 0.1, 2: 0, 3: 1}, abs=1e-6)
        assert each.growth == pytest.approx({1: 1.1, 2: 1, 3: 2}, abs=1e-6)
        # The latent of 10, and three blocks.
        outputs = {step: float(values[0]) for step, values in each.output.items()}
        assert outputs == pytest.approx({0: 13, 1: 13.3, 2: 13.3, 3: 16.6}, abs=1e-4)
        assert len(each.output[0]) == 8
    assert module.run() == "3333"


def test_magcache_learns_the_mean_growth(ramp: Any) -> None:
    modules = [ramp([1, 1.1, 1.1] + [1.1] * 5), ramp([1, 1.3, 1.3] + [1.3] * 5)]
    found = []
    for module in modules:
        with observe(module) as trajectories:
            module.run()
        found += trajectories
    section = fit(CacheSection(policy="magcache", num_steps=8, threshold=0.1), found)
    assert section.magnitudes == pytest.approx((1, 1.2, 1, 1, 1, 1, 1, 1), abs=1e-5)
    assert CacheSection.from_dict(section.as_dict()) == section
    assert apply_cache(modules[0], section)._notes(8) == ()


def test_a_table_for_another_number_of_steps_is_read_at_the_nearest_place() -> None:
    assert resampled((1.0, 2.0, 3.0), 5) == (1, 1, 2, 3, 3)
    assert resampled((1.0, 2.0, 3.0), 1) == (3,)
    assert resampled((), 5) == ()


def test_teacache_learns_a_polynomial_that_it_is_given() -> None:
    changes = np.linspace(0.01, 0.2, 30)
    wanted = (3.0, -1.0, 0.5, 0.02)
    residuals = np.polyval(wanted, changes)
    trajectory = Trajectory("", "cond", 1)
    trajectory.change.update(enumerate(changes.tolist(), 1))
    trajectory.residual.update(enumerate(residuals.tolist(), 1))
    section = fit(CacheSection(policy="teacache", num_steps=31), [trajectory])
    assert section.coefficients is not None
    assert section.signal_range == pytest.approx((0.01, 0.2))
    found = polynomial(section.coefficients, torch.tensor(changes))
    assert np.allclose(found.numpy(), residuals, atol=1e-5)


def test_few_points_get_a_line_and_not_a_polynomial_of_degree_four() -> None:
    trajectory = Trajectory("", "cond", 1)
    trajectory.change.update({1: 0.1, 2: 0.2, 3: 0.3})
    trajectory.residual.update({1: 0.2, 2: 0.4, 3: 0.6})
    section = fit(CacheSection(policy="teacache"), [trajectory])
    assert section.coefficients == pytest.approx((2, 0), abs=1e-9)


def test_nothing_observed_is_an_error() -> None:
    for policy in ("magcache", "teacache"):
        with pytest.raises(InputError, match=r"inside of observe\(\)"):
            fit(CacheSection(policy=policy), [])
    untouched = CacheSection(policy="fixed")
    assert fit(untouched, []) is untouched


def test_a_pipeline_is_observed_per_branch(make: Any) -> None:
    pipe = make("wan")
    expected = pipe()
    with observe(pipe.transformer) as trajectories:
        assert torch.equal(pipe(), expected)
    assert [each.branch for each in trajectories] == ["cond", "uncond"]
    section = fit(CacheSection(policy="magcache"), trajectories)
    assert section.magnitudes is not None
    assert len(section.magnitudes) == 8
