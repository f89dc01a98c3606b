from __future__ import annotations

import math
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from vcompress.compress.numerics import int4
from vcompress.spec.errors import InputError


@pytest.fixture(scope="module")
def peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.int4_tensor import INT4QTensor
    return INT4QTensor


def weights(seed: int, num_rows: int = 512) -> torch.Tensor:
    """Groups of 32 of magnitudes 2^-11 to 2^13, one in twenty all zero, `[num_rows, 1024]`."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(num_rows, 32, 32, generator=generator)
    groups *= torch.exp2(torch.randint(-10, 12, (num_rows, 32, 1), generator=generator))
    groups[torch.rand(num_rows, 32, generator=generator) < 0.05] = 0
    return groups.flatten(1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_numpy_and_ml_dtypes(group_size: int) -> None:
    weight = weights(group_size)
    stored = int4.quantize_weight(weight, group_size=group_size)
    groups = weight.numpy().reshape(len(weight), -1, group_size)
    amax = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), amax / np.float32(7)).astype(np.float16)
    codes = np.clip(np.rint(groups / scale.astype(np.float32)), -8, 7).astype(ml_dtypes.int4)
    np.testing.assert_array_equal(stored.scale.numpy(), scale[..., 0])
    unpacked = int4.unpack(stored.packed).numpy()
    np.testing.assert_array_equal(unpacked, codes.astype(np.int8).reshape(weight.shape))
    values = codes.astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(
        int4.dequantize(stored.packed, stored.scale).numpy(), values.reshape(weight.shape)
    )


@pytest.mark.filterwarnings("ignore:Skipping extension")
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_modelopt_where_its_scale_is_exact(peer: Any, group_size: int) -> None:
    # amax is 7 * 2^k in every group, so that 7 / amax and amax / 7 are exact.
    generator = torch.Generator().manual_seed(group_size)
    groups = (torch.rand(512, 1024 // group_size, group_size, generator=generator) - 0.5) * 14
    groups[..., 1] = 7.0
    groups[..., 2] = -2.5
    powers = torch.randint(-14, 13, (512, 1024 // group_size, 1), generator=generator)
    weight = (groups * torch.exp2(powers)).flatten(1)
    theirs, scale = peer.quantize(weight.clone(), group_size)
    stored = int4.quantize_weight(weight, group_size=group_size)
    # There: the even index in the high four bits, codes from 0 to 15.
    pairs = torch.stack((theirs._quantized_data >> 4, theirs._quantized_data & 15), -1)
    assert torch.equal(int4.unpack(stored.packed), pairs.flatten(-2).to(torch.int8) - 8)
    assert torch.equal(stored.scale.float().flatten(), 1 / scale.flatten())
    values = theirs.dequantize(torch.float32, scale=scale, block_sizes={-1: group_size})
    assert torch.equal(int4.dequantize(stored.packed, stored.scale), values)


def test_bytes_are_those_of_onnx() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    packed = int4.pack(codes)
    tensor = onnx.helper.make_tensor(
        "codes", onnx.TensorProto.INT4, [16], packed.numpy().tobytes(), raw=True
    )
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes.numpy())
    assert packed[0].item() == 0x98
    assert torch.equal(int4.unpack(packed), codes)


def test_by_hand() -> None:
    weight = torch.zeros(1, 64)
    # amax 14, scale 2: 14 to 7, -3 / 2 is a tie and rounds to -2, 1 / 2 to 0.
    weight[0, :3] = torch.tensor([14.0, -3.0, 1.0])
    stored = int4.quantize_weight(weight, group_size=32)
    assert stored.scale.tolist() == [[2.0, 1.0]]
    assert stored.packed[0, :2].tolist() == [7 | 14 << 4, 0]
    assert stored.packed.shape == (1, 32)
    values = int4.dequantize(stored.packed, stored.scale)
    assert values[0, :3].tolist() == [14.0, -4.0, 0.0]
    assert not values[0, 32:].any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_are_those_that_are_stored(group_size: int) -> None:
    stored = int4.quantize_weight(torch.randn(6, 256), group_size=group_size)
    num_bits = int4.weight_bits((6, 256), group_size=group_size)
    assert num_bits == 8 * (stored.packed.nbytes + stored.scale.nbytes)
    assert num_bits / (6 * 256) == 4 + 16 / group_size


def test_relative_error_grows_with_the_group() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        (
            (int4.fake_quantize_weight(weight, group_size=size) - weight).norm() / weight.norm()
        ).item()
        for size in (32, 64, 128)
    ]
    assert errors == sorted(errors)
    assert 0.08 < errors[0] < errors[2] < 0.13


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 2.0**-24, 1e-6, 1e-4, 1e4, 7 * 65504.0])
def test_extreme_weights_stay_finite(value: float) -> None:
    weight = torch.full((2, 64), -value)
    rounded = int4.fake_quantize_weight(weight, group_size=32)
    assert bool(rounded.isfinite().all())
    # Scales below 2^-14 have fewer than eleven bits, below 2^-24 there is none.
    tolerance = 2.0**-10 if value > 7 * 2**-14 else 1.0
    torch.testing.assert_close(rounded, weight, rtol=tolerance, atol=0)


def test_low_precision_keeps_its_type() -> None:
    weight = torch.randn(4, 128).bfloat16()
    assert int4.fake_quantize_weight(weight).dtype == torch.bfloat16
    assert torch.equal(
        int4.fake_quantize_weight(weight), int4.fake_quantize_weight(weight.float()).bfloat16()
    )


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.ones(4, 96), "int4 needs a last axis divisible by 64 and not empty, w has 96"),
        (torch.ones(4, 7), "w has 7"),
        (torch.ones(4, 0), "none of them empty"),
        (torch.ones(2, 64, 3), r"w must have shape \[N, K\] for int4"),
        (torch.full((2, 64), 5e5), r"w must have magnitudes of at most 7 \* 65504"),
        (torch.full((2, 64), math.nan), "w must be finite"),
        (torch.full((2, 64), math.inf), "w must be finite"),
    ],
)
def test_weight_that_is_refused(weight: torch.Tensor, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        int4.quantize_weight(weight, group_size=64, name="w")


def test_group_size_that_no_runtime_has() -> None:
    with pytest.raises(InputError, match="group_size of int4 must be one of"):
        int4.quantize_weight(torch.ones(2, 48), group_size=48)
    with pytest.raises(InputError, match="got 0"):
        int4.weight_bits((2, 48), group_size=0)


def test_operator_is_sound() -> None:
    stored = int4.quantize_weight(torch.randn(4, 128))
    torch.library.opcheck(
        torch.ops.vcompress.int4_dequantize.default, (stored.packed, stored.scale)
    )
