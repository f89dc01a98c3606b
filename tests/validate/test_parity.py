"""Parity on functions whose difference is known."""

from __future__ import annotations

import numpy as np
import pytest

from vcompress.spec.errors import InputError
from vcompress.validate.parity import check_parity

A = np.array([1.0, 2.0, 3.0], dtype=np.float32)
B = np.array([-1.0, 0.5, 2.0], dtype=np.float32)


def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


def test_equal_functions_pass() -> None:
    result = check_parity(double, lambda x: x + x, [A, B], tolerance=0.0)
    assert result.verdict == "pass"
    assert [one.relative_l2 for one in result.inputs] == [0.0, 0.0]


def test_the_numbers_of_each_input() -> None:
    # 2x against 2.02x: relative error 0.01, largest difference 0.02 * 3.
    result = check_parity(double, lambda x: 2.02 * x, [A, B], tolerance=1e-3)
    assert result.verdict == "fail"
    assert result.relative_l2_max == pytest.approx(0.01, rel=1e-4)
    assert result.inputs[0].max_abs == pytest.approx(0.06, rel=1e-4)
    assert result.as_dict()["inputs"][1]["verdict"] == "fail"


def test_a_graph_with_its_example_baked_in_fails() -> None:
    baked = double(A)
    result = check_parity(double, lambda x: baked, [A, B], tolerance=1e-3)
    assert [one.verdict for one in result.inputs] == ["pass", "fail"]
    assert result.verdict == "fail"


def test_a_rounding_tie_is_shown_by_moving_the_input() -> None:
    # The first value lies exactly between two codes: numpy rounds 0.5 to 0, the other kernel to
    # 1. One unit in a vector of norm ~ 700 is 0.0014 of it.
    rest = np.arange(10, 110, dtype=np.float32)
    tie = np.concatenate([np.array([0.5], dtype=np.float32), rest])
    result = check_parity(
        np.round, lambda x: np.floor(x + np.float32(0.5)), [tie, tie + 1.25],
        tolerance=1e-4, tie_tolerance=1e-2,
    )  # fmt: skip
    assert result.verdict == "ties"
    assert result.inputs[0].verdict == "ties"
    assert "rounding tie" in str(result.inputs[0].note)
    assert result.inputs[1].verdict == "pass"


def test_a_constant_error_is_no_tie() -> None:
    result = check_parity(double, lambda x: 2.002 * x, [A, B], tolerance=1e-4, tie_tolerance=1e-2)
    assert result.verdict == "fail"
    assert "no rounding tie" in str(result.inputs[0].note)


def test_ties_above_their_own_tolerance_fail() -> None:
    pair = [np.array([0.5, 3.0]), np.array([1.5, 3.0])]
    result = check_parity(
        np.round, lambda x: np.floor(x + 0.5), pair, tolerance=1e-4, tie_tolerance=1e-2
    )
    assert result.inputs[0].verdict == "fail"


def test_the_caller_may_show_the_tie() -> None:
    found = check_parity(
        double, lambda x: 2.002 * x, [A, B], tolerance=1e-4, tie_tolerance=1e-2,
        find_tie=lambda x: "layer head: 3.5 became 4, here 3",
    )  # fmt: skip
    assert found.verdict == "ties"
    assert found.as_dict()["inputs"][0]["note"] == "layer head: 3.5 became 4, here 3"


@pytest.mark.parametrize("broken", [lambda x: x[:2], lambda x: x * np.nan])
def test_outputs_that_cannot_be_compared_fail(broken: object) -> None:
    result = check_parity(double, broken, [A, B], tolerance=1.0, tie_tolerance=2.0)  # type: ignore[arg-type]
    assert result.verdict == "fail"
    assert result.as_dict()["relative_l2_max"] is None


def test_inputs_must_be_two_and_different() -> None:
    with pytest.raises(InputError, match="at least two"):
        check_parity(double, double, [A], tolerance=0.0)
    with pytest.raises(InputError, match="inputs 0 and 2 are equal"):
        check_parity(double, double, [A, B, A.copy()], tolerance=0.0)
    with pytest.raises(InputError, match="tells apart"):
        check_parity(np.zeros_like, np.zeros_like, [A, B], tolerance=0.0)
    with pytest.raises(InputError, match="tolerances"):
        check_parity(double, double, [A, B], tolerance=0.1, tie_tolerance=0.01)
