from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import fp8
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

ONE = torch.tensor(1.0)


def test_input_rounds_like_ml_dtypes() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal(2**20) * np.exp2(generator.integers(-14, 10, 2**20))
    x = x.clip(-448, 448).astype(np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rounded = fp8.quantize_dequantize(torch.from_numpy(x), ONE)
    np.testing.assert_array_equal(rounded.numpy(), expected)


def test_every_value_and_every_tie() -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    ties = (values[1:] + values[:-1]) / 2
    around = [np.nextafter(ties, np.float32(side)) for side in (-1e9, 1e9)]
    x = np.concatenate([values, ties, *around]).astype(np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rounded = fp8.quantize_dequantize(torch.from_numpy(x), ONE)
    np.testing.assert_array_equal(rounded.numpy(), expected)


def test_weight_has_one_scale() -> None:
    weight = torch.randn(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    stored = fp8.quantize_weight(weight)
    assert stored.codes.dtype == torch.float8_e4m3fn
    assert stored.scale.item() == (weight.abs().max() / 448).item()
    assert stored.codes.float().abs().max().item() == 448.0
    values = fp8.dequantize(stored.codes, stored.scale)
    assert torch.equal(values, fp8.fake_quantize_weight(weight))
    assert torch.equal(values, fp8.quantize_dequantize(weight, stored.scale))
    assert (values - weight).norm() / weight.norm() < 0.03


@pytest.mark.parametrize("shape", [(1024, 1023), (64, 8, 3, 5, 7)])
def test_weight_with_a_scale_for_each_channel_rounds_like_ml_dtypes(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    one_a_channel = (-1, *[1] * (len(shape) - 1))
    powers = torch.randint(-40, 40, (shape[0],), generator=generator).view(one_a_channel)
    weight = torch.randn(shape, generator=generator) * torch.exp2(powers)
    weight[3] = 0
    stored = fp8.quantize_weight(weight, per_channel=True)
    assert stored.scale.shape == shape[:1]
    assert stored.scale[3].item() == 1.0
    amax = weight.flatten(1).abs().amax(1)
    assert torch.equal(stored.scale[4:], amax[4:] / 448)
    scaled = (weight / stored.scale.view(one_a_channel)).clamp(-448, 448)
    expected = scaled.numpy().astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored.codes.view(torch.uint8).numpy(), expected.view(np.uint8))
    values = fp8.dequantize(stored.codes, stored.scale)
    assert torch.equal(values, fp8.fake_quantize_weight(weight, per_channel=True))
    # Each channel is what it would be alone.
    alone = fp8.fake_quantize_weight(weight[5:6])
    assert torch.equal(values[5:6], alone)


def test_scales_for_channels_keep_small_channels() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[8:] *= 2.0**-20
    error = fp8.fake_quantize_weight(weight, per_channel=True) - weight
    assert bool((error.norm(dim=1) / weight.norm(dim=1) < 0.04).all())
    assert bool((fp8.fake_quantize_weight(weight)[8:] == 0).any())


@pytest.mark.parametrize("per_channel", [False, True])
def test_bits_are_those_that_are_stored(per_channel: bool) -> None:
    stored = fp8.quantize_weight(torch.randn(6, 3, 5), per_channel=per_channel)
    num_bits = fp8.weight_bits((6, 3, 5), per_channel=per_channel)
    assert num_bits == 8 * (stored.codes.nbytes + stored.scale.nbytes)
    assert fp8.weight_bits((6, 3, 5)) == FORMATS["fp8"].weight_bits((6, 3, 5))


def test_what_is_too_large_saturates_and_nan_stays() -> None:
    x = torch.tensor([500.0, -1e30, math.inf, -math.inf, math.nan])
    rounded = fp8.quantize_dequantize(x, ONE)
    assert rounded[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
    assert bool(rounded[4].isnan())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 2.0**-100, 1e20, 2.0**126])
@pytest.mark.parametrize("per_channel", [False, True])
def test_extreme_weights_stay_finite(value: float, per_channel: bool) -> None:
    weight = torch.full((2, 32), value)
    rounded = fp8.fake_quantize_weight(weight, per_channel=per_channel)
    assert bool(rounded.isfinite().all())
    torch.testing.assert_close(rounded, weight, rtol=1e-6, atol=0 if value > 1e-31 else value)


def test_weight_of_zeros_has_scale_one() -> None:
    stored = fp8.quantize_weight(torch.zeros(2, 3))
    assert stored.scale.item() == 1.0
    assert not stored.codes.float().any()


def test_low_precision_keeps_its_type() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    assert fp8.quantize_dequantize(x, fp8.input_scale(4.0)).dtype == torch.float16


def test_weight_that_is_not_finite() -> None:
    with pytest.raises(InputError, match="weight must be finite and at most"):
        fp8.quantize_weight(torch.tensor([[1.0, math.inf]]))


def test_operators_are_sound() -> None:
    operators = torch.ops.vcompress
    torch.library.opcheck(
        operators.fp8_quantize_dequantize.default, (torch.randn(2, 3), torch.tensor(0.01))
    )
    codes = torch.randn(2, 3).to(torch.float8_e4m3fn)
    # The rest of opcheck does arithmetic on its arguments, which torch lacks for eight-bit floats.
    for scale in (ONE, torch.ones(2)):
        torch.library.opcheck(
            operators.fp8_dequantize.default,
            (codes, scale),
            test_utils=("test_faketensor", "test_aot_dispatch_static"),
        )
