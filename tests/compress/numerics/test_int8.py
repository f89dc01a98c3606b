from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vcompress.compress.numerics import int8
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS


def test_weight_has_a_scale_for_each_channel() -> None:
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    stored = int8.quantize_weight(weight)
    torch.testing.assert_close(stored.scale, torch.tensor([0.01, 1.0, 2.0]))
    # 1 / 2 and 3 / 2 are ties: to the even 0 and 2.
    assert stored.codes.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 0, 2]]
    assert stored.codes.dtype == torch.int8


def test_weight_of_a_convolution() -> None:
    weight = torch.randn(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    stored = int8.quantize_weight(weight)
    assert stored.codes.shape == weight.shape
    assert stored.scale.shape == (6,)
    values = int8.dequantize(stored.codes, stored.scale, 0)
    step = stored.scale.view(-1, 1, 1, 1, 1)
    assert bool(((values - weight).abs() <= step / 2 * 1.0001).all())
    assert torch.equal(int8.fake_quantize_weight(weight), values)


def test_input_rounds_like_onnx() -> None:
    # The reference: round(x / scale) in float32, half to even, saturated.
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(2**18) * np.exp2(generator.integers(-8, 3, 2**18))).astype("f4")
    scale = int8.input_scale(4.0)
    x[:512] = (np.arange(-256, 256) + 0.5) * scale.numpy()
    expected = np.clip(np.rint(x / scale.numpy()), -128, 127) * scale.numpy()
    rounded = int8.quantize_dequantize(torch.from_numpy(x), scale, 0)
    np.testing.assert_array_equal(rounded.numpy(), expected)


def test_input_with_a_scale_for_each_index() -> None:
    x = torch.tensor([[0.6, 10.4], [300.0, -300.0]])
    scale = torch.tensor([1.0, 2.0])
    by_column = int8.quantize_dequantize(x, scale, -1)
    assert by_column.tolist() == [[1.0, 10.0], [127.0, -256.0]]
    by_row = int8.quantize_dequantize(x, scale, 0)
    assert by_row.tolist() == [[1.0, 10.0], [254.0, -256.0]]


def test_input_with_dynamic_scales_rounds_like_onnx() -> None:
    generator = np.random.default_rng(0)
    # 1,024 tokens of 1,023 channels, magnitudes 2^-60 to 2^60.
    powers = generator.integers(-60, 60, (1024, 1))
    x = (generator.standard_normal((1024, 1023)) * np.exp2(powers)).astype("f4")
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    # Ties, in tokens whose scale is 1.
    x[:4] = generator.integers(-126, 126, (4, 1023)) + 0.5
    x[:4, 0], scale[:4] = -127, 1
    expected = np.clip(np.rint(x / scale), -128, 127) * scale
    rounded = int8.quantize_dequantize_per_token(torch.from_numpy(x))
    np.testing.assert_array_equal(rounded.numpy(), expected)


def test_tokens_do_not_depend_on_each_other() -> None:
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    x[0, 1] *= 1e6
    rounded = int8.quantize_dequantize_per_token(x)
    rows = [int8.quantize_dequantize_per_token(token) for token in x.flatten(0, 1)]
    assert torch.equal(rounded.flatten(0, 1), torch.stack(rows))
    error = (rounded - x).norm(dim=-1) / x.norm(dim=-1)
    assert bool((error < 0.01).all())


def test_dynamic_scales_outside_the_range() -> None:
    x = torch.ones(6, 5)
    x[0] = 0
    x[1] = 1e-42
    x[2, 1] = math.nan
    x[3, :2] = torch.tensor([math.inf, -math.inf])
    x[4, 0] = -3e38
    rounded = int8.quantize_dequantize_per_token(x)
    assert not rounded[:2].any()
    assert bool(rounded[2].isnan().all())
    assert rounded[3].tolist() == [2.0**126, -(2.0**126), 0, 0, 0]
    assert rounded[4, 0].item() == -(2.0**126)
    torch.testing.assert_close(rounded[5], x[5], rtol=1e-6, atol=0)
    assert int8.quantize_dequantize_per_token(x[3].half())[0].item() == math.inf


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1,)])
def test_dynamic_scales_of_any_shape(shape: tuple[int, ...]) -> None:
    assert int8.quantize_dequantize_per_token(torch.ones(shape)).shape == shape


def test_dynamic_scales_of_strided_and_low_precision_input() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    rounded = int8.quantize_dequantize_per_token(x.t())
    assert rounded.dtype == torch.float16
    assert rounded.is_contiguous()
    expected = int8.quantize_dequantize_per_token(x.t().contiguous().float())
    assert torch.equal(rounded, expected.half())


def test_bits_are_those_that_are_stored() -> None:
    stored = int8.quantize_weight(torch.randn(6, 3, 5))
    num_bits = int8.weight_bits((6, 3, 5))
    assert num_bits == 8 * (stored.codes.nbytes + stored.scale.nbytes)
    assert num_bits == FORMATS["int8"].weight_bits((6, 3, 5))


def test_infinities_saturate_and_nan_stays() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = int8.quantize_dequantize(x, torch.tensor(1.0), 0)
    assert rounded[:2].tolist() == [127.0, -128.0]
    assert bool(rounded[2].isnan())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-28, 1e20, 2.0**126])
def test_extreme_weights_stay_finite(value: float) -> None:
    weight = torch.full((2, 32), value)
    rounded = int8.fake_quantize_weight(weight)
    assert bool(rounded.isfinite().all())
    torch.testing.assert_close(rounded, weight, rtol=1e-6, atol=0 if value > 1e-28 else value)


def test_low_precision_keeps_its_type() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = int8.quantize_dequantize(x, int8.input_scale(4.0), 0)
    assert rounded.dtype == torch.bfloat16
    assert int8.fake_quantize_weight(x).dtype == torch.bfloat16


def test_weight_that_is_not_finite() -> None:
    weight = torch.ones(4, 2, 3)
    weight[1, 0, 2] = math.nan
    with pytest.raises(InputError, match=r"stem\.weight must be finite.*nan at \(1, 0, 2\)"):
        int8.quantize_weight(weight, name="stem.weight")


def test_operators_are_sound() -> None:
    operators = torch.ops.vcompress
    torch.library.opcheck(
        operators.int8_quantize_dequantize.default, (torch.randn(2, 3), torch.tensor(0.01), 0)
    )
    for x in (torch.randn(2, 3), torch.randn(3, 2).t()):
        torch.library.opcheck(operators.int8_quantize_dequantize_per_token.default, (x,))
    torch.library.opcheck(
        operators.int8_dequantize.default, (torch.ones(2, 3, dtype=torch.int8), torch.ones(2), 0)
    )
