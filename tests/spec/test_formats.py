"""What formats cost and take."""

from __future__ import annotations

import pytest

from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.target import TARGETS, find_target


@pytest.mark.parametrize(
    ("name", "expected_bits"),
    [
        # 64 * 32 values at 4 bits, 64 * 2 block scales at 8 bits, one tensor scale at 32 bits.
        ("nvfp4", 64 * 32 * 4 + 64 * 2 * 8 + 32),
        # One FP32 scale for each of 64 output channels.
        ("int8", 64 * 32 * 8 + 64 * 32),
        ("int8_token", 64 * 32 * 8 + 64 * 32),
        # One FP32 scale for the tensor, or for each of 64 output channels.
        ("fp8", 64 * 32 * 8 + 32),
        ("fp8_channel", 64 * 32 * 8 + 64 * 32),
        # One E8M0 scale for 32 values, no tensor scale.
        ("mxfp8", 64 * 32 * 8 + 64 * 8),
        ("mxfp4", 64 * 32 * 4 + 64 * 8),
        # One FP16 scale for 32 values.
        ("int4_g32", 64 * 32 * 4 + 64 * 16),
    ],
)
def test_bits_count_every_scale(name: str, expected_bits: int) -> None:
    assert FORMATS[name].weight_bits((64, 32)) == expected_bits


def test_objections_name_constraint_and_value() -> None:
    assert FORMATS["nvfp4"].objection("linear", (64, 32)) is None
    assert "divisible by 16, got 30" in str(FORMATS["nvfp4"].objection("linear", (64, 30)))
    assert "not conv3d" in str(FORMATS["nvfp4"].objection("conv3d", (64, 16, 1, 1, 1)))
    assert FORMATS["int8"].objection("conv3d", (64, 3, 2, 8, 8)) is None


def test_every_format_of_a_target_is_known() -> None:
    for target in TARGETS.values():
        assert target.formats[-1] == FLOAT
        assert set(target.formats[:-1]) <= set(FORMATS)


def test_only_static_scales_need_a_range() -> None:
    static = {name for name, format in FORMATS.items() if format.needs_input_amax}
    assert static == {"nvfp4", "fp8", "int8"}
    as_they_are = {name for name, format in FORMATS.items() if format.input_bits == 0}
    assert as_they_are == {"int4_g32", "int4_g64", "int4_g128"}


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(InputError, match="choose one of: nvfp4, fp8, int8, int8_token, int4"):
        find_target("fp4")
