"""Where the calls of a run stand; the expected steps and branches are written out by hand."""

from __future__ import annotations

from vcompress.compress.cache.clock import Clock


def placed(clock: Clock, *calls: tuple[float, str | None]) -> list[tuple[int, str, bool]]:
    ticks = [clock.tick(timestep, context) for timestep, context in calls]
    return [(tick.step, tick.branch, tick.is_start) for tick in ticks]


def test_named_branches_share_the_step() -> None:
    calls = [(9.0, "cond"), (9.0, "uncond"), (8.0, "cond"), (8.0, "uncond")]
    assert placed(Clock(), *calls) == [
        (0, "cond", True), (0, "uncond", False), (1, "cond", False), (1, "uncond", False),
    ]  # fmt: skip


def test_without_names_the_order_of_the_calls_tells_the_branches_apart() -> None:
    assert placed(Clock(), (9, None), (9, None), (8, None), (8, None)) == [
        (0, "call 1", True), (0, "call 2", False), (1, "call 1", False), (1, "call 2", False),
    ]  # fmt: skip


def test_a_timestep_that_goes_back_starts_a_generation_in_either_direction() -> None:
    assert placed(Clock(), (9, None), (5, None), (9, None))[-1] == (0, "call 1", True)
    assert placed(Clock(), (1, None), (5, None), (8, None), (1, None)) == [
        (0, "call 1", True), (1, "call 1", False), (2, "call 1", False), (0, "call 1", True),
    ]  # fmt: skip


def test_a_branch_that_comes_twice_at_one_timestep_starts_a_generation() -> None:
    assert placed(Clock(), (9, "cond"), (9, "cond")) == [(0, "cond", True), (0, "cond", True)]


def test_a_branch_that_joins_late_has_the_step_of_the_run() -> None:
    assert placed(Clock(), (9, "cond"), (8, "cond"), (8, "uncond"))[-1] == (1, "uncond", False)


def test_a_told_step_counts() -> None:
    clock = Clock()
    first = clock.tick(9.0, "cond", 4)
    later = clock.tick(7.0, "cond", 6)
    again = clock.tick(6.0, "cond", 3)
    assert [(tick.step, tick.is_start) for tick in (first, later, again)] == [
        (4, True), (6, False), (3, True),
    ]  # fmt: skip
