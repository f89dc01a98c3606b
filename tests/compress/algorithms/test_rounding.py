from __future__ import annotations

import pytest
import torch

from vcompress.compress.algorithms.clipping import search_input_amax, search_scales
from vcompress.compress.algorithms.rounding import (
    GRIDS,
    four_over_six_scales,
    largest_scales,
    pack_weight,
    round_weight,
)
from vcompress.compress.numerics import nvfp4
from vcompress.compress.stored import CODECS, check_stored


def weight(num_outputs: int = 24, num_channels: int = 256) -> torch.Tensor:
    values = torch.randn(num_outputs, num_channels, generator=torch.Generator().manual_seed(0))
    values[0] = 0.0
    values[1, :64] = 0.0
    values[2] *= 1e-4
    return values


def test_every_format_has_a_grid() -> None:
    assert GRIDS.keys() == CODECS.keys()


@pytest.mark.parametrize("format", GRIDS)
def test_the_largest_scales_round_as_the_format_does(format: str) -> None:
    codec = CODECS[format]
    expected = codec.dequantize(codec.quantize(weight(), "weight"))
    assert torch.equal(round_weight(weight(), largest_scales(weight(), format)), expected)


@pytest.mark.parametrize("format", GRIDS)
def test_what_is_packed_is_what_was_rounded(format: str) -> None:
    scales = search_scales(weight(), torch.rand(256) + 0.1, format)
    values = round_weight(weight(), scales)
    buffers = pack_weight(values, scales)
    check_stored(buffers, format, (24, 256), "weight")
    assert torch.equal(CODECS[format].dequantize(buffers), values)
    # Rounded values are on the grid, where rounding changes nothing.
    assert torch.equal(round_weight(values, scales), values)


def test_four_over_six_is_that_of_the_format() -> None:
    values = round_weight(weight(), four_over_six_scales(weight()))
    assert torch.equal(values, nvfp4.fake_quantize_weight(weight(), four_over_six=True))


@pytest.mark.parametrize("format", GRIDS)
def test_the_search_lowers_the_weighted_error(format: str) -> None:
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4

    def error(values: torch.Tensor) -> float:
        return float(((values - weight()).square() * importance).sum())

    usual = error(round_weight(weight(), largest_scales(weight(), format)))
    found = error(round_weight(weight(), search_scales(weight(), importance, format)))
    # Formats of eight bits already hold nearly everything; the others gain.
    assert found <= usual * (0.95 if GRIDS[format].largest_code <= 7 else 1.001)


def test_four_over_six_is_among_the_candidates() -> None:
    values = weight()
    ours = round_weight(values, search_scales(values, torch.ones(256), "nvfp4"))
    theirs = round_weight(values, four_over_six_scales(values))
    assert (ours - values).square().sum() < (theirs - values).square().sum()


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4", "int8_token", "int4_g64"])
def test_a_lone_outlier_is_clipped_where_the_range_is_static(format: str) -> None:
    inputs = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    inputs[0, 0] = 100.0
    # The channel of the outlier hardly matters to the output.
    importance = torch.ones(256)
    importance[0] = 1e-6
    amax = search_input_amax(inputs, importance, format, 100.0)
    assert amax == 40.0 if format == "int8" else amax <= 100.0
    if format in ("nvfp4", "int8_token", "int4_g64"):
        assert amax == 100.0
