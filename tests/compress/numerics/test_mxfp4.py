from __future__ import annotations

import math
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import mxfp4
from vcompress.spec.errors import InputError

# Half to even goes up here, modelopt's MXFP4 goes down.
TIES_THAT_DIFFER = torch.tensor([0.75, 1.75, 3.5])


@pytest.fixture(scope="module")
def peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    return MXFP4QTensor


def weights(seed: int, exponent: int, num_rows: int = 64) -> torch.Tensor:
    """Blocks of many magnitudes around 2^exponent, `[num_rows, 1024]`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(num_rows, 32, 32, generator=generator)
    powers = torch.randint(-12, 12, (num_rows, 32, 1), generator=generator)
    return (blocks * torch.exp2(powers.float() + exponent)).flatten(1)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_modelopt_but_for_ties(peer: Any, dtype: torch.dtype) -> None:
    # 2 x 9 x 65,536 values, magnitudes 2^-89 to 2^96.
    num_ties = 0
    for exponent in range(-77, 95, 20):
        weight = weights(exponent + 100, exponent).to(dtype)
        theirs, block_scale = peer.quantize(weight, 32)
        ours = mxfp4.quantize_weight(weight)
        assert torch.equal(bits(ours.block_scale), block_scale.view(64, 32))
        scale = ours.block_scale.float().repeat_interleave(32, 1)
        scaled = weight / scale
        tie = torch.isin(scaled.abs(), TIES_THAT_DIFFER)
        num_ties += int(tie.sum())
        # Positive zeros have the code of negative ones there.
        expected = mxfp4.unpack(theirs._quantized_data).masked_fill(weight == 0, 0)
        codes = mxfp4.unpack(ours.packed)
        assert torch.equal(codes[~tie], expected[~tie])
        assert torch.equal(codes[tie], expected[tie] + 1)
        values = theirs.dequantize(torch.float32, scale=block_scale, block_sizes={-1: 32})
        dequantized = mxfp4.dequantize(ours.packed, ours.block_scale)
        assert torch.equal(dequantized[~tie], values[~tie])
    # Weights of eight bits often lie in the middle: both sides of the comparison are exercised.
    assert num_ties > 1000 or dtype == torch.float32


def test_elements_round_like_ml_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**15, 32, generator=generator)
    x = (x * torch.exp2(torch.randint(-4, 3, x.shape, generator=generator))).clamp_(-6, 6)
    # Every block holds a 6, so that its scale is 1 and elements stand alone.
    x[:, 0] = 6
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    toward = torch.cat([torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    x[0, 1:8], x[1, 1:8], x[2, 1:15] = ties, -ties, toward
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    result = mxfp4.quantize_dequantize(x)
    np.testing.assert_array_equal(result.numpy(), expected.astype(np.float32))
    stored = mxfp4.quantize_weight(x)
    assert bool((stored.block_scale.float() == 1).all())
    np.testing.assert_array_equal(mxfp4.unpack(stored.packed).numpy(), expected.view(np.uint8))


def test_by_hand() -> None:
    weight = torch.zeros(1, 64)
    # 7 / 6 is above 1: scale 2. 7 / 2 = 3.5 rounds to 4, code 6; -1 / 2, code 9; -.2 / 2 to -0.
    weight[0, :4] = torch.tensor([7.0, -1.0, -0.2, 0.4])
    # 6 / 6 is 1. 6 is code 7, -5 is a tie and rounds to -4, code 14.
    weight[0, 32:34] = torch.tensor([6.0, -5.0])
    stored = mxfp4.quantize_weight(weight)
    assert bits(stored.block_scale).tolist() == [[128, 127]]
    assert stored.packed[0, :2].tolist() == [6 | 9 << 4, 8 | 0 << 4]
    assert stored.packed[0, 16].item() == 7 | 14 << 4
    values = mxfp4.dequantize(stored.packed, stored.block_scale)
    assert values[0, :4].tolist() == [8.0, -1.0, 0.0, 0.0]
    assert values[0, 32:34].tolist() == [6.0, -4.0]


def test_input_rounds_like_a_weight() -> None:
    weight = weights(3, 0)
    assert torch.equal(mxfp4.quantize_dequantize(weight), mxfp4.fake_quantize_weight(weight))


def test_relative_error_of_normal_weights() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (mxfp4.fake_quantize_weight(weight) - weight).norm() / weight.norm()
    assert 0.11 < error < 0.13


def test_bits_are_those_that_are_stored() -> None:
    stored = mxfp4.quantize_weight(torch.randn(6, 96))
    assert mxfp4.weight_bits((6, 96)) == 8 * (stored.packed.nbytes + stored.block_scale.nbytes)
    assert mxfp4.weight_bits((64, 128)) / (64 * 128) == 4.25


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 2.0**-100, 1e20, 2.0**126])
def test_extreme_weights_stay_finite(value: float) -> None:
    weight = torch.full((2, 64), value)
    rounded = mxfp4.fake_quantize_weight(weight)
    assert bool(rounded.isfinite().all())
    torch.testing.assert_close(rounded, weight, rtol=0.25, atol=0 if value > 1e-29 else value)
    assert mxfp4.quantize_weight(weight).block_scale.float().min().item() >= 2.0**-100


def test_block_of_zeros_has_scale_one() -> None:
    weight = torch.ones(2, 64)
    weight[1, 32:] = 0
    stored = mxfp4.quantize_weight(weight)
    assert stored.block_scale.float().tolist() == [[0.25, 0.25], [0.25, 1.0]]
    assert not stored.packed[1, 16:].any()
    assert torch.equal(mxfp4.quantize_dequantize(weight), weight)


def test_infinities_saturate_and_nan_stays_in_its_block() -> None:
    x = torch.ones(2, 64)
    x[0, 3], x[1, 2], x[1, 33] = math.nan, math.inf, -3e38
    rounded = mxfp4.quantize_dequantize(x)
    assert bool(rounded[0, :32].isnan().all())
    assert torch.equal(rounded[0, 32:], x[0, 32:])
    assert rounded[1, 2].item() == 2.0**126
    assert rounded[1, 33].item() == -(2.0**126)
    assert not rounded[1, 3:32].any()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 5, 64)])
def test_input_of_any_shape_and_type(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = mxfp4.quantize_dequantize(x)
    assert rounded.shape == x.shape
    assert rounded.dtype == torch.bfloat16
    expected = mxfp4.quantize_dequantize(x.reshape(-1, 32).float())
    assert torch.equal(rounded.reshape(-1, 32), expected.bfloat16())


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.ones(4, 48), "mxfp4 needs a last axis divisible by 32 and not empty, w has 48"),
        (torch.ones(4, 7), "w has 7"),
        (torch.ones(4, 0), "none of them empty"),
        (torch.ones(2, 32, 3), r"w must have shape \[N, K\] for mxfp4"),
        (torch.full((2, 32), math.nan), "w must be finite"),
        (torch.full((2, 32), math.inf), "w must be finite"),
    ],
)
def test_weight_that_is_refused(weight: torch.Tensor, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        mxfp4.quantize_weight(weight, name="w")


def test_input_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="the input has 16"):
        mxfp4.quantize_dequantize(torch.ones(2, 16))


def test_operators_are_sound() -> None:
    operators = torch.ops.vcompress
    torch.library.opcheck(operators.mxfp4_quantize_dequantize.default, (torch.randn(2, 3, 32),))
    stored = mxfp4.quantize_weight(torch.randn(4, 64))
    # The rest of opcheck does arithmetic on its arguments, which torch lacks for eight-bit floats.
    torch.library.opcheck(
        operators.mxfp4_dequantize.default,
        (stored.packed, stored.block_scale),
        test_utils=("test_faketensor", "test_aot_dispatch_static"),
    )
