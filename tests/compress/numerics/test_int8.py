from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vcompress.compress.numerics import int8
from vcompress.spec.errors import InputError


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
    torch.library.opcheck(
        operators.int8_dequantize.default, (torch.ones(2, 3, dtype=torch.int8), torch.ones(2), 0)
    )
