"""What formats cost and take."""

from __future__ import annotations

import pytest

from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.target import find_target


@pytest.mark.parametrize(
    ("name", "expected_bits"),
    [
        # 64 * 32 values at 4 bits, 64 * 2 block scales at 8 bits, one tensor scale at 32 bits.
        ("nvfp4", 64 * 32 * 4 + 64 * 2 * 8 + 32),
        # One FP32 scale for each of 64 output channels.
        ("int8", 64 * 32 * 8 + 64 * 32),
        # One FP32 scale for the tensor.
        ("fp8", 64 * 32 * 8 + 32),
    ],
)
def test_bits_count_every_scale(name: str, expected_bits: int) -> None:
    assert FORMATS[name].weight_bits((64, 32)) == expected_bits


def test_objections_name_constraint_and_value() -> None:
    assert FORMATS["nvfp4"].objection("linear", (64, 32)) is None
    assert "divisible by 16, got 30" in str(FORMATS["nvfp4"].objection("linear", (64, 30)))
    assert "not conv3d" in str(FORMATS["nvfp4"].objection("conv3d", (64, 16, 1, 1, 1)))
    assert FORMATS["int8"].objection("conv3d", (64, 3, 2, 8, 8)) is None


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(InputError, match="choose one of: nvfp4, fp8, int8"):
        find_target("fp4")
