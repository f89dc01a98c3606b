from __future__ import annotations

import math

import pytest
import torch

from vcompress.compress.numerics import operands
from vcompress.spec.errors import InputError


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_largest_magnitude(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -3.5], [2.0, 0.0]]).to(dtype)
    amax = operands.largest_magnitude(weight, "w")
    assert amax.dtype == torch.float32
    assert amax.item() == 3.5


def test_largest_magnitude_of_what_float32_cannot_hold() -> None:
    weight = torch.tensor([[1.0, -1e300]], dtype=torch.float64)
    with pytest.raises(InputError, match=r"1 of 2 values are not, the first is -inf at \(0, 1\)"):
        operands.largest_magnitude(weight, "w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    # 131 values: whole vectors of every width, and a rest.
    for column in range(131):
        weight = torch.randn(1, 131, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight[0, column] = bad
        with pytest.raises(InputError, match=rf"1 of 131 values are not.*at \(0, {column}\)"):
            operands.largest_magnitude(weight, "w")
