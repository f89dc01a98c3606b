from __future__ import annotations

import numpy as np
import pytest

from vcompress.validate.agreement import check_agreement

SURE = np.eye(5)[[0, 1, 2, 3] * 50]


def test_equal_answers_need_no_look() -> None:
    def never(number: int) -> bool:
        raise AssertionError(number)

    found = check_agreement(SURE, 0.5 * SURE, never)
    assert found.verdict == "pass"
    assert found.as_dict()["agreement_percent"] == 100.0


def test_clips_with_two_answers_are_looked_at() -> None:
    other = SURE.copy()
    other[[3, 7]] = np.eye(5)[4]
    seen: list[int] = []
    found = check_agreement(SURE, other, lambda number: not seen.append(number))
    assert seen == [3, 7]
    assert found.verdict == "ties"
    assert found.as_dict()["agreement_percent"] == 99.0
    assert found.as_dict()["agreement_ties_shown_percent"] == 100.0


def test_one_that_ties_do_not_explain_is_a_fail() -> None:
    other = SURE.copy()
    other[[3, 7]] = np.eye(5)[4]
    found = check_agreement(SURE, other, lambda number: number == 3)
    assert found.verdict == "fail"
    assert found.as_dict()["agreement_ties_shown_percent"] == pytest.approx(99.5)


def test_of_very_many_a_spread_sample_is_looked_at() -> None:
    other = np.roll(SURE, 1, axis=1)
    found = check_agreement(SURE, other, lambda number: number < 100)
    assert (found.num_differing, found.num_looked_at, found.num_tied) == (200, 64, 32)
    assert found.as_dict()["agreement_ties_shown_percent"] == pytest.approx(50.0)
