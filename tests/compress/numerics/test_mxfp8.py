from __future__ import annotations

import math
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import mxfp8
from vcompress.spec.errors import InputError


@pytest.fixture(scope="module")
def peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    return MXFP8QTensor


def weights(seed: int, exponent: int, num_rows: int = 64) -> torch.Tensor:
    """Blocks of many magnitudes around 2^exponent, `[num_rows, 1024]`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(num_rows, 32, 32, generator=generator)
    powers = torch.randint(-12, 12, (num_rows, 32, 1), generator=generator)
    return (blocks * torch.exp2(powers.float() + exponent)).flatten(1)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_modelopt_bit_for_bit(peer: Any, dtype: torch.dtype) -> None:
    # 2 x 9 x 65,536 values, magnitudes 2^-89 to 2^96.
    for exponent in range(-77, 95, 20):
        weight = weights(exponent + 100, exponent).to(dtype)
        theirs, block_scale = peer.quantize(weight)
        ours = mxfp8.quantize_weight(weight)
        assert torch.equal(bits(ours.codes), bits(theirs._quantized_data))
        assert torch.equal(bits(ours.block_scale), block_scale)
        values = theirs.dequantize(torch.float32, scale=block_scale)
        assert torch.equal(mxfp8.dequantize(ours.codes, ours.block_scale), values)


def test_scale_is_exact_where_modelopts_logarithm_is_not(peer: Any) -> None:
    # One unit in the last place above 448 * 2^-30 needs 2^-29; log2 gives exactly -30.
    weight = torch.full((1, 32), 448 * 2.0**-30)
    assert mxfp8.quantize_weight(weight).block_scale.float().item() == 2.0**-30
    weight = torch.nextafter(weight, torch.tensor(1.0))
    assert mxfp8.quantize_weight(weight).block_scale.float().item() == 2.0**-29
    assert peer.quantize(weight)[1].item() == 127 - 30
    values = peer.quantize(weight)[0].dequantize(torch.float32, scale=peer.quantize(weight)[1])
    assert torch.equal(values, mxfp8.fake_quantize_weight(weight))


def test_scales_read_as_ml_dtypes() -> None:
    stored = mxfp8.quantize_weight(weights(0, 0))
    expected = bits(stored.block_scale).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(stored.block_scale.float().numpy(), expected)
    assert stored.block_scale.dtype == torch.float8_e8m0fnu
    assert stored.block_scale.shape == (64, 32)


def test_elements_round_like_ml_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**15, 32, generator=generator)
    x = (x * torch.exp2(torch.randint(-16, 7, x.shape, generator=generator))).clamp_(-448, 448)
    # Every block holds a 448, so that its scale is 1 and elements stand alone.
    x[:, 0] = 448
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = torch.from_numpy((codes[1:] + codes[:-1]) / 2)
    for row, values in enumerate(
        (ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, -ties))
    ):
        x[5 * row : 5 * row + 5, 1:31] = torch.cat([values, -values[:24]]).view(5, 30)
    expected = x.numpy().astype(ml_dtypes.float8_e4m3fn)
    result = mxfp8.quantize_dequantize(x)
    np.testing.assert_array_equal(result.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(
        bits(mxfp8.quantize_weight(x).codes).numpy(), expected.view(np.uint8)
    )


def test_by_hand() -> None:
    weight = torch.zeros(1, 64)
    # 449 / 448 is above 1: scale 2. 449 / 2 = 224.5 rounds to 224, in steps of 16.
    weight[0, :3] = torch.tensor([449.0, -3.0, 0.1])
    # 1 / 448 is between 2^-9 and 2^-8.
    weight[0, 32] = 1.0
    stored = mxfp8.quantize_weight(weight)
    assert stored.block_scale.float().tolist() == [[2.0, 2.0**-8]]
    assert bits(stored.block_scale).tolist() == [[128, 119]]
    assert stored.codes.float()[0, :2].tolist() == [224.0, -1.5]
    assert mxfp8.dequantize(stored.codes, stored.block_scale)[0, 32].item() == 1.0


def test_input_rounds_like_a_weight() -> None:
    weight = weights(3, 0)
    assert torch.equal(mxfp8.quantize_dequantize(weight), mxfp8.fake_quantize_weight(weight))


def test_relative_error_of_normal_weights() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (mxfp8.fake_quantize_weight(weight) - weight).norm() / weight.norm()
    assert 0.024 < error < 0.029


def test_bits_are_those_that_are_stored() -> None:
    stored = mxfp8.quantize_weight(torch.randn(6, 96))
    assert mxfp8.weight_bits((6, 96)) == 8 * (stored.codes.nbytes + stored.block_scale.nbytes)
    assert mxfp8.weight_bits((64, 128)) / (64 * 128) == 8.25


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 2.0**-100, 1e20, 2.0**126])
def test_extreme_weights_stay_finite(value: float) -> None:
    weight = torch.full((2, 64), value)
    rounded = mxfp8.fake_quantize_weight(weight)
    assert bool(rounded.isfinite().all())
    torch.testing.assert_close(rounded, weight, rtol=2**-4, atol=0 if value > 1e-28 else value)
    assert mxfp8.quantize_weight(weight).block_scale.float().min().item() >= 2.0**-100


def test_block_of_zeros_has_scale_one() -> None:
    weight = torch.ones(2, 64)
    weight[1, 32:] = 0
    stored = mxfp8.quantize_weight(weight)
    assert stored.block_scale.float().tolist() == [[2.0**-8, 2.0**-8], [2.0**-8, 1.0]]
    assert not bits(stored.codes)[1, 32:].any()
    assert torch.equal(mxfp8.quantize_dequantize(weight), weight)


def test_infinities_and_huge_inputs_saturate() -> None:
    x = torch.zeros(3, 32)
    x[0, :2] = torch.tensor([math.inf, -1e38])
    x[1, :2] = torch.tensor([-math.inf, 1.0])
    x[2, 0] = 3.4e38
    rounded = mxfp8.quantize_dequantize(x)
    assert rounded[0, :2].tolist() == [2.0**126, -(2.0**126)]
    assert rounded[1, :2].tolist() == [-(2.0**126), 0.0]
    assert rounded[2, 0].item() == 2.0**126
    assert mxfp8.quantize_dequantize(x.half())[0, 0].item() == math.inf


def test_nan_makes_its_block_nan_and_no_other() -> None:
    x = torch.ones(2, 64)
    x[0, 3] = math.nan
    rounded = mxfp8.quantize_dequantize(x)
    assert bool(rounded[0, :32].isnan().all())
    assert torch.equal(rounded[0, 32:], x[0, 32:])
    assert torch.equal(rounded[1], x[1])


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 5, 64), (2, 2**17 + 32)])
def test_input_of_any_shape(shape: tuple[int, ...]) -> None:
    # The last shape is cut into pieces inside; rows must not depend on each other.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded = mxfp8.quantize_dequantize(x)
    assert rounded.shape == x.shape
    blocks = x.reshape(-1, 32)
    rows = [mxfp8.quantize_dequantize(block) for block in blocks[-100:]]
    assert torch.equal(rounded.reshape(-1, 32)[-100:], torch.stack(rows) if rows else blocks)


def test_strided_input_and_low_precision() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    rounded = mxfp8.quantize_dequantize(x.t()[:, :32])
    assert rounded.dtype == torch.float16
    expected = mxfp8.quantize_dequantize(x.t()[:, :32].contiguous().float())
    assert torch.equal(rounded, expected.half())
    assert mxfp8.fake_quantize_weight(x[:, :32].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.ones(4, 48), "mxfp8 needs a last axis divisible by 32 and not empty, w has 48"),
        (torch.ones(4, 7), "w has 7"),
        (torch.ones(4, 0), "none of them empty"),
        (torch.ones(2, 32, 3), r"w must have shape \[N, K\] for mxfp8"),
        (torch.ones(2, 32, dtype=torch.int32), "must be floating-point"),
        (torch.full((2, 32), math.nan), "w must be finite"),
        (torch.full((2, 32), -math.inf), "w must be finite"),
        (torch.full((2, 32), 3e38), "w must be finite"),
    ],
)
def test_weight_that_is_refused(weight: torch.Tensor, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        mxfp8.quantize_weight(weight, name="w")


def test_input_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="the input has 20"):
        mxfp8.quantize_dequantize(torch.ones(2, 20))


def test_operators_are_sound() -> None:
    operators = torch.ops.vcompress
    torch.library.opcheck(operators.mxfp8_quantize_dequantize.default, (torch.randn(2, 3, 32),))
    stored = mxfp8.quantize_weight(torch.randn(4, 64))
    # The rest of opcheck does arithmetic on its arguments, which torch lacks for eight-bit floats.
    torch.library.opcheck(
        operators.mxfp8_dequantize.default,
        (stored.codes, stored.block_scale),
        test_utils=("test_faketensor", "test_aot_dispatch_static"),
    )
