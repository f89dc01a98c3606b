from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import e2m1, nvfp4


def finite_bfloat16() -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    return every[every.isfinite()]


def test_codes_are_those_of_ml_dtypes_for_every_bfloat16() -> None:
    values = finite_bfloat16()
    expected = values.numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = e2m1.encode(values.clone()).numpy()
    # A negative zero is a positive one.
    np.testing.assert_array_equal(codes[values != 0], expected[values != 0])
    assert not codes[values == 0].any()


def test_codes_are_those_of_the_rounded_values() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    drawn = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 3
    values = torch.cat([ties, -ties, near, -near, drawn])
    codes = e2m1.encode(values.clone())
    decoded = torch.tensor(e2m1.ELEMENT_VALUES)[codes.long()]
    assert torch.equal(decoded, e2m1.round_(values))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_pack_takes_any_layout(start: int) -> None:
    codes = torch.arange(64, dtype=torch.uint8) % 16
    # A slice that starts at an odd byte, and one whose rows are not contiguous.
    piece = codes[start : start + 32]
    assert torch.equal(e2m1.unpack(e2m1.pack(piece)), piece)
    columns = codes.view(4, 16)[:, start : start + 8]
    assert torch.equal(e2m1.unpack(e2m1.pack(columns)), columns)


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_of_several_pieces_is_made_of_its_rows(
    dtype: torch.dtype, four_over_six: bool
) -> None:
    # 2.5 pieces; rows do not end where pieces do.
    weight = torch.randn(320, 2064, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Every row has the same amax, so that it has the same tensor scale alone.
    weight[:, 7] = 6
    whole = nvfp4.quantize_weight(weight, four_over_six=four_over_six)
    assert whole.packed.shape == (320, 1032)
    assert whole.block_scale.shape == (320, 129)
    for row in (0, 100, 127, 128, 255, 319):
        alone = nvfp4.quantize_weight(weight[row : row + 1], four_over_six=four_over_six)
        assert torch.equal(alone.packed[0], whole.packed[row])
        scales = [one.view(torch.uint8) for one in (alone.block_scale[0], whole.block_scale[row])]
        assert torch.equal(*scales)


def test_weight_that_is_not_contiguous_is_left_as_it_is() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    kept = weight.clone()
    strided = nvfp4.quantize_weight(weight.t()[:, :32])
    plain = nvfp4.quantize_weight(weight.t()[:, :32].contiguous())
    assert torch.equal(strided.packed, plain.packed)
    nvfp4.quantize_weight(weight)
    assert torch.equal(weight, kept)
