from __future__ import annotations

import math

import torch

from vcompress.compress.numerics.rounding import round_mantissa_


def test_half_goes_to_even() -> None:
    # One mantissa bit and a smallest normal of 1: the numbers are 0, .5, 1, 1.5, 2, 3, 4, 6.
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(round_mantissa_(halves.clone(), num_bits=1, smallest_normal=1.0), even)
    assert torch.equal(round_mantissa_(-halves, num_bits=1, smallest_normal=1.0), -even)


def test_next_to_a_half_goes_to_the_nearest() -> None:
    half = torch.tensor(2.5)
    below, above = torch.nextafter(half, torch.tensor(0.0)), torch.nextafter(half, half * 2)
    rounded = round_mantissa_(torch.stack([below, above]), num_bits=1, smallest_normal=1.0)
    assert rounded.tolist() == [2.0, 3.0]


def test_nan_stays() -> None:
    assert math.isnan(
        round_mantissa_(torch.tensor([math.nan]), num_bits=3, smallest_normal=0.5).item()
    )


def test_changes_its_argument() -> None:
    values = torch.tensor([0.3])
    assert round_mantissa_(values, num_bits=1, smallest_normal=1.0) is values
    assert values.item() == 0.5
