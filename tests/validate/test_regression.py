"""The rule of the regression benchmark, on machines whose truth is known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.regression import (
    PRESETS,
    Noise,
    decide,
    estimate,
    minus,
    simulate_quads,
    simulated_outcome,
    verdict,
)

_RUNS = 200


def outcomes(noise: Noise, slowdown: float) -> Counter[str]:
    quads = simulate_quads(noise, slowdown, runs=_RUNS, seed=1)
    return Counter(simulated_outcome(one) for one in quads)


@pytest.mark.parametrize("name", PRESETS)
def test_finds_five_percent_and_clears_the_same_program(name: str) -> None:
    assert outcomes(PRESETS[name], 0.0)["regression"] <= 0.02 * _RUNS
    assert outcomes(PRESETS[name], 0.05)["regression"] >= 0.93 * _RUNS


def test_noise_that_hides_everything_is_inconclusive() -> None:
    wild = Noise(
        block=0.5, drift=0.05, enter=0.2, leave=0.1, amplitude=2.0, spike=0.3, spike_scale=1.0,
        process=0.1,
    )  # fmt: skip
    for slowdown in (0.0, 0.05):
        found = outcomes(wild, slowdown)
        assert found["inconclusive"] > 0.5 * _RUNS
        assert found["pass"] < 0.1 * _RUNS


def test_swapped_arms_flip_the_sign() -> None:
    quads = simulate_quads(PRESETS["typical"], 0.05, runs=1, seed=3)[0]
    there, back = estimate(quads), estimate(-quads)
    assert there.log_ratio == pytest.approx(-back.log_ratio)
    assert there.standard_error == pytest.approx(back.standard_error)
    assert decide(back, last=True) == "pass"


def test_process_effects_are_not_averaged_away_by_quads() -> None:
    pairs = np.array([0.03, -0.03, 0.02, -0.02, 0.03, -0.03])
    quads = np.repeat(pairs[:, None], 1000, axis=1)
    assert estimate(quads).standard_error == pytest.approx(pairs.std(ddof=1) / np.sqrt(6))


def test_a_stored_baseline_adds_its_own_uncertainty() -> None:
    quads = simulate_quads(PRESETS["calm"], 0.0, runs=2, seed=5)
    new, old = estimate(quads[0]), estimate(quads[1])
    difference = minus(new, old)
    assert difference.log_ratio == pytest.approx(new.log_ratio - old.log_ratio)
    assert difference.standard_error > max(new.standard_error, old.standard_error)


def test_the_interval_is_in_the_reason() -> None:
    found = estimate(simulate_quads(PRESETS["calm"], 0.1, runs=1, seed=0)[0])
    judged = verdict(found, "regression")
    assert judged.lower_percent is not None
    assert judged.upper_percent is not None
    assert judged.lower_percent < 10 < judged.upper_percent
    assert f"{judged.lower_percent:+.1f}" in judged.reason


def test_numbers_that_are_none_are_refused() -> None:
    quads = np.zeros((6, 10))
    quads[2, 3] = np.nan
    with pytest.raises(InputError, match="finite"):
        estimate(quads)
