"""Timing with a clock that the runners themselves advance: exact, and no claim about speed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.latency import describe_device, measure_interleaved


class FakeMachine:
    """A clock in nanoseconds and a log of who ran; each call may take longer than the last."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now = 0
        self.log: list[str] = []
        self.drift = drift

    def runner(self, name: str, milliseconds: float) -> Callable[[], object]:
        def run() -> object:
            slower = math.exp(self.drift * len(self.log))
            self.log.append(name)
            self.now += round(milliseconds * 1e6 * slower)
            return name

        return run

    def clock(self) -> int:
        return self.now


def test_order_is_warm_up_then_abba_baab() -> None:
    machine = FakeMachine()
    runners = {"a": machine.runner("a", 2.0), "b": machine.runner("b", 1.0)}
    measure_interleaved(runners, warm_up=2, rounds=2, clock=machine.clock)
    assert "".join(machine.log) == "abab" + "abba" + "baab"


def test_three_runners_stand_in_mirrored_order() -> None:
    machine = FakeMachine()
    runners = {name: machine.runner(name, 1.0) for name in "abc"}
    measure_interleaved(runners, warm_up=1, rounds=2, clock=machine.clock)
    assert "".join(machine.log) == "abc" + "abccba" + "cbaabc"


def test_a_steady_drift_of_the_machine_does_not_change_the_ratio() -> None:
    # Every call takes 1 % longer than the one before: over 400 calls, 55 times as long. In a
    # round a b b a the exponents are 0 + 3 and 1 + 2, so the ratio of the geometric means is
    # exactly 2.
    machine = FakeMachine(drift=0.01)
    runners = {"a": machine.runner("a", 2.0), "b": machine.runner("b", 1.0)}
    times = measure_interleaved(runners, warm_up=1, rounds=100, clock=machine.clock)
    speed = times["b"].speed
    assert speed is not None
    assert speed.versus == "a"
    assert speed.median == pytest.approx(2.0, rel=1e-5)
    assert speed.lower == pytest.approx(2.0, rel=1e-5)
    assert speed.upper == pytest.approx(2.0, rel=1e-5)
    assert times["a"].speed is None


def test_statistics_by_hand() -> None:
    # Calls of 1, 2, ..., 20 ms: quantile p lies at 1 + 19 p.
    machine = FakeMachine()
    durations = iter([99, *range(1, 21)])

    def run() -> None:
        machine.now += next(durations) * 1_000_000

    one = measure_interleaved({"a": run}, warm_up=1, rounds=10, clock=machine.clock)["a"]
    assert (one.num_runs, one.num_warm_up) == (20, 1)
    assert (one.min_ms, one.mean_ms, one.p50_ms) == (1.0, 10.5, 10.5)
    assert (one.p25_ms, one.p75_ms, one.iqr_ms) == (5.75, 15.25, 9.5)
    assert one.p90_ms == pytest.approx(18.1)
    # Twenty calls say nothing about the slowest in a hundred.
    assert one.p99_ms is None


def test_interval_of_the_median_ratio() -> None:
    # Half of the rounds at ratio 1, half at 4: the median of resamples takes both.
    machine = FakeMachine()
    calls = iter(range(1000))

    def run() -> None:
        machine.now += 4_000_000 if next(calls) % 4 < 2 else 1_000_000

    runners = {"a": machine.runner("a", 4.0), "b": run}
    # The warm-up takes one call; from then on a b b a, b a a b call b twice a round.
    next(calls)
    speed = measure_interleaved(runners, warm_up=1, rounds=40, clock=machine.clock)["b"].speed
    assert speed is not None
    assert speed.lower == pytest.approx(1.0)
    assert speed.upper == pytest.approx(4.0)
    again = measure_interleaved(
        {"a": machine.runner("a", 4.0), "b": run}, warm_up=2, rounds=40, clock=machine.clock
    )["b"].speed
    assert again is not None
    assert (again.lower, again.upper) == (speed.lower, speed.upper)


def test_few_rounds_have_no_interval() -> None:
    machine = FakeMachine()
    runners = {"a": machine.runner("a", 3.0), "b": machine.runner("b", 4.0)}
    speed = measure_interleaved(runners, warm_up=1, rounds=5, clock=machine.clock)["b"].speed
    assert speed is not None
    assert speed.median == pytest.approx(0.75)
    assert (speed.lower, speed.upper) == (None, None)


def test_goes_on_until_enough_time_was_measured() -> None:
    machine = FakeMachine()
    runners = {"a": machine.runner("a", 10.0)}
    times = measure_interleaved(runners, warm_up=1, rounds=2, min_seconds=0.5, clock=machine.clock)
    assert times["a"].num_runs == 50


def test_what_cannot_be_timed_is_refused() -> None:
    machine = FakeMachine()
    with pytest.raises(InputError, match="at least one runner"):
        measure_interleaved({}, warm_up=1, rounds=1)
    with pytest.raises(InputError, match="warm-up"):
        measure_interleaved({"a": machine.runner("a", 1.0)}, warm_up=0, rounds=1)
    with pytest.raises(InputError, match="fast took 0 ns"):
        measure_interleaved(
            {"fast": machine.runner("fast", 0.0)}, warm_up=1, rounds=1, clock=machine.clock
        )


def test_real_clock_sees_real_work() -> None:
    times = measure_interleaved(
        {"a": lambda: sum(range(2000)), "b": lambda: sum(range(2000))}, warm_up=1, rounds=6
    )
    assert all(one.min_ms > 0 and one.num_runs == 12 for one in times.values())


def test_device_facts_are_of_this_machine() -> None:
    device = describe_device(2)
    assert device["num_threads"] == 2
    assert device["num_cores"] == os.cpu_count()
    assert device["cpu"]
    assert device["platform"]
