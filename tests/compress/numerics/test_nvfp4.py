from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import nvfp4
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS


@pytest.fixture(scope="module")
def peer() -> Any:
    """modelopt's implementation, the one that NVIDIA's tools read and write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    return NVFP4QTensor


def weights(seed: int, exponent: int, num_rows: int = 64) -> torch.Tensor:
    """Blocks of many magnitudes around 10^exponent, one in twenty all zero."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(num_rows, 32, 16, generator=generator)
    powers = torch.randint(-12, 12, (num_rows, 32, 1), generator=generator)
    blocks *= torch.exp2(powers.float())
    blocks[torch.rand(num_rows, 32, generator=generator) < 0.05] = 0
    return blocks.flatten(1) * 10.0**exponent


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_modelopt_bit_for_bit(peer: Any, dtype: torch.dtype) -> None:
    # 2 x 17 x 32,768 values, magnitudes 1e-16 to 1e16.
    for exponent in range(-12, 13, 1 if dtype == torch.float32 else 3):
        weight = weights(exponent + 100, exponent).to(dtype)
        theirs, block_scale, tensor_scale = peer.quantize(weight.clone(), 16)
        ours = nvfp4.quantize_weight(weight)
        assert torch.equal(ours.packed, theirs._quantized_data)
        assert torch.equal(bits(ours.block_scale), bits(block_scale))
        assert torch.equal(ours.tensor_scale, tensor_scale)
        values = theirs.dequantize(
            torch.float32, scale=block_scale, double_scale=tensor_scale, block_sizes={-1: 16}
        )
        assert torch.equal(
            nvfp4.dequantize(ours.packed, ours.block_scale, ours.tensor_scale), values
        )


def test_a_scale_that_underflows_equals_modelopt(peer: Any) -> None:
    # A block 1e45 times smaller than the tensor: its scale is 0 before it becomes 1.0.
    weight = torch.full((2, 32), 1e30)
    weight[:, 16:] = 1e-40
    theirs, block_scale, _ = peer.quantize(weight.clone(), 16)
    ours = nvfp4.quantize_weight(weight)
    assert torch.equal(ours.packed, theirs._quantized_data)
    assert torch.equal(bits(ours.block_scale), bits(block_scale))
    assert ours.block_scale[0, 1].float().item() == 1.0


def test_elements_round_like_ml_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**16, 16, generator=generator)
    x *= torch.exp2(torch.randint(-4, 3, x.shape, generator=generator).float())
    x.clamp_(-6, 6)
    # Every block holds a 6, so that with tensor scale 1 its scale is 1 and elements stand alone.
    x[:, 0] = 6
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    toward = torch.cat([torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    x[0, 1:8], x[1, 1:8], x[2, 1:15] = ties, -ties, toward
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    result = nvfp4.quantize_dequantize(x, torch.tensor(1.0))
    np.testing.assert_array_equal(result.numpy(), expected)


def test_by_hand() -> None:
    # amax 6 * 448 gives tensor scale 1; the second block has amax 12, hence block scale 2.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0 * 448, -3 * 448, 448])
    weight[0, 16:20] = torch.tensor([12.0, -5.0, 0.9, -0.4])
    stored = nvfp4.quantize_weight(weight)
    assert stored.tensor_scale.item() == 1.0
    assert stored.block_scale.float().tolist() == [[448.0, 2.0]]
    # 12 / 2 = 6 is code 7; -5 / 2 = -2.5 rounds to -2, code 12; .45 to .5, code 1; -.2 to -0.
    assert stored.packed[0, 8:10].tolist() == [7 | 12 << 4, 1 | 8 << 4]
    values = nvfp4.dequantize(stored.packed, stored.block_scale, stored.tensor_scale)
    assert values[0, :3].tolist() == [6.0 * 448, -3 * 448, 448]
    assert values[0, 16:20].tolist() == [12.0, -4.0, 1.0, 0.0]


def four_over_six_of_modelopt(peer: Any, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Elements, block and tensor scale that modelopt's NVFP4_FOUR_OVER_SIX calibrates and exports.

    Its fake quantization is a Triton kernel; here the search quantizes as the export does.
    """
    from modelopt.torch.quantization.calib.mse import MseCalibrator

    blocks = weight.float().view(-1, 16)
    amax = blocks.abs().amax(1, keepdim=True)
    quantizer = SimpleNamespace(
        block_sizes={-1: 16, "four_over_six": True}, global_amax=weight.float().abs().max()
    )

    def export(values: torch.Tensor, block_amax: torch.Tensor) -> tuple[Any, ...]:
        quantizer._amax = block_amax.clone()
        scales = peer.get_weights_scaling_factor_from_quantizer(quantizer, values)
        return peer.quantize(values.clone(), 16, *scales)

    def quantize(values: torch.Tensor, block_amax: torch.Tensor) -> torch.Tensor:
        stored, scale, tensor_scale = export(values, block_amax)
        return stored.dequantize(
            torch.float32, scale=scale, double_scale=tensor_scale, block_sizes={-1: 16}
        )

    search = MseCalibrator(
        amax, axis=0, step_size=0.5, start_multiplier=1.0, stop_multiplier=1.5, quant_func=quantize
    )
    search.collect(blocks)
    stored, scale, tensor_scale = export(weight.float(), search.compute_amax())
    return stored._quantized_data, scale, tensor_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_over_six_equals_modelopt(peer: Any, dtype: torch.dtype) -> None:
    # 16 + 4 times 32,768 values.
    seeds = range(0, 16, 1 if dtype == torch.float32 else 4)
    num_fours = num_different = 0
    for seed in seeds:
        weight = weights(seed, seed - 8).to(dtype)
        packed, block_scale, tensor_scale = four_over_six_of_modelopt(peer, weight)
        ours = nvfp4.quantize_weight(weight, four_over_six=True)
        assert torch.equal(ours.tensor_scale, tensor_scale)
        zeros = weight.view(64, 32, 16).eq(0).all(-1)
        assert bool((ours.block_scale.float()[zeros] == 1).all())
        same = bits(ours.block_scale) == bits(block_scale)
        assert torch.equal(ours.packed.view(64, 32, 8)[same], packed.view(64, 32, 8)[same])
        different = ~(same | zeros)
        num_different += int(different.sum())
        assert_choices_equally_good(weight, ours, packed, block_scale, different)
        plain = nvfp4.quantize_weight(weight).block_scale.float() / 448 * 256
        num_fours += int((ours.block_scale.float() > plain * 1.25).sum())
    # There are 2,048 blocks in each.
    assert num_different <= 2 * len(seeds)
    assert 500 * len(seeds) < num_fours < 1500 * len(seeds)


def assert_choices_equally_good(
    weight: torch.Tensor,
    ours: nvfp4.Nvfp4Weight,
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    where: torch.Tensor,
) -> None:
    """Where modelopt chose the other scale, the two squared errors agree to rounding."""
    errors = []
    for elements, scale in ((ours.packed, ours.block_scale), (packed, block_scale)):
        values = nvfp4.dequantize(elements, scale, ours.tensor_scale)
        errors.append((values - weight).double().square().view(64, 32, 16).sum(-1)[where])
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)


def test_four_over_six_by_hand() -> None:
    # amax 6 * 256 gives tensor scale 1. The second block: 12 and 9 are 6 and 4.5, a miss, with
    # scale 2, and 4 and 3 with scale 3. In the third 12 and 8 are 6 and 4 with scale 2.
    weight = torch.zeros(1, 48)
    weight[0, 0] = 6.0 * 256
    weight[0, 16:18] = torch.tensor([12.0, 9.0])
    weight[0, 32:34] = torch.tensor([12.0, -8.0])
    stored = nvfp4.quantize_weight(weight, four_over_six=True)
    assert stored.tensor_scale.item() == 1.0
    # The first block is exact either way, which takes 6.
    assert stored.block_scale.float().tolist() == [[256.0, 3.0, 2.0]]
    assert stored.packed[0, 8].item() == 6 | 5 << 4
    assert torch.equal(nvfp4.fake_quantize_weight(weight, four_over_six=True), weight)


def test_four_over_six_lowers_the_error_of_normal_weights() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    plain = (nvfp4.fake_quantize_weight(weight) - weight).norm() / weight.norm()
    adaptive = nvfp4.fake_quantize_weight(weight, four_over_six=True)
    assert (adaptive - weight).norm() / weight.norm() < 0.95 * plain


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-28, 2.0**-100, 1e-20, 1e20, 2.0**126])
def test_four_over_six_of_extreme_weights(value: float) -> None:
    weight = torch.full((2, 32), value)
    weight[:, 16:] = 0
    rounded = nvfp4.fake_quantize_weight(weight, four_over_six=True)
    torch.testing.assert_close(rounded, weight, rtol=1e-6, atol=0 if value > 1e-27 else value)
    assert nvfp4.quantize_weight(weight, four_over_six=True).block_scale[0, 1].float().item() == 1.0


def test_bits_are_those_that_are_stored() -> None:
    stored = nvfp4.quantize_weight(torch.randn(6, 96))
    tensors = (stored.packed, stored.block_scale, stored.tensor_scale)
    assert nvfp4.weight_bits((6, 96)) == 8 * sum(tensor.nbytes for tensor in tensors)
    assert nvfp4.weight_bits((6, 96)) == FORMATS["nvfp4"].weight_bits((6, 96))


def test_input_rounds_like_a_weight_of_the_same_scale() -> None:
    weight = weights(3, 0)
    stored = nvfp4.quantize_weight(weight)
    rounded = nvfp4.quantize_dequantize(weight, stored.tensor_scale)
    assert torch.equal(rounded, nvfp4.fake_quantize_weight(weight))


def test_relative_error_of_normal_weights() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (nvfp4.fake_quantize_weight(weight) - weight).norm() / weight.norm()
    assert 0.090 < error < 0.100


def test_pack_and_unpack() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    packed = nvfp4.pack(codes)
    assert packed[0, 0].item() == 0x10
    assert torch.equal(nvfp4.unpack(packed), codes)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-28, 2.0**-100, 1e-20, 1e20, 2.0**126])
def test_extreme_weights_stay_finite(value: float) -> None:
    weight = torch.full((2, 32), value)
    rounded = nvfp4.fake_quantize_weight(weight)
    assert bool(rounded.isfinite().all())
    # Below the smallest tensor scale values are lost, never wrong by more than themselves.
    torch.testing.assert_close(rounded, weight, rtol=1e-6, atol=0 if value > 1e-27 else value)


def test_weight_of_zeros() -> None:
    stored = nvfp4.quantize_weight(torch.zeros(2, 32))
    assert stored.tensor_scale.item() == 1.0
    assert bool((stored.block_scale.float() == 1).all())
    assert not stored.packed.any()


def test_input_beyond_the_calibrated_amax_saturates() -> None:
    x = torch.tensor([8.0, -math.inf, 1.0] + [0.0] * 13)
    rounded = nvfp4.quantize_dequantize(x, nvfp4.input_scale(4.0))
    # 4 / (6 * 448) is rounded to float32.
    torch.testing.assert_close(rounded[:2], torch.tensor([4.0, -4.0]), rtol=1e-6, atol=0)
    assert bool(rounded.isfinite().all())


def test_nan_makes_its_block_nan_and_no_other() -> None:
    x = torch.ones(2, 32)
    x[0, 3] = math.nan
    rounded = nvfp4.quantize_dequantize(x, nvfp4.input_scale(4.0))
    assert bool(rounded[0, :16].isnan().all())
    assert bool(rounded[0, 16:].isfinite().all())
    assert bool(rounded[1].isfinite().all())


def test_input_of_zeros_and_subnormals() -> None:
    scale = nvfp4.input_scale(4.0)
    assert not nvfp4.quantize_dequantize(torch.zeros(3, 16), scale).any()
    assert not nvfp4.quantize_dequantize(torch.full((3, 16), 1e-42), scale).any()


@pytest.mark.parametrize("shape", [(16,), (0, 32), (3, 5, 64), (2, 2**17 + 16)])
def test_input_of_any_shape(shape: tuple[int, ...]) -> None:
    # The last shape is cut into pieces inside; rows must not depend on each other.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = nvfp4.input_scale(4.0)
    rounded = nvfp4.quantize_dequantize(x, scale)
    assert rounded.shape == x.shape
    blocks = x.reshape(-1, 16)
    rows = [nvfp4.quantize_dequantize(block, scale) for block in blocks[:200]]
    assert torch.equal(rounded.reshape(-1, 16)[:200], torch.stack(rows) if rows else blocks)


def test_strided_input_and_low_precision() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    scale = nvfp4.input_scale(4.0)
    rounded = nvfp4.quantize_dequantize(x.t()[:, :32], scale)
    assert rounded.dtype == torch.float16
    expected = nvfp4.quantize_dequantize(x.t()[:, :32].contiguous().float(), scale)
    assert torch.equal(rounded, expected.half())


def test_input_scale() -> None:
    assert nvfp4.input_scale(2688.0).item() == 1.0
    assert nvfp4.input_scale(0.0).item() == nvfp4.input_scale(1.0).item()


@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0, 1e38])
def test_input_scale_needs_a_magnitude(amax: float) -> None:
    with pytest.raises(InputError, match="input_amax must be a finite number from 0 to"):
        nvfp4.input_scale(amax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_weight_that_is_not_finite(bad: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 5] = bad
    with pytest.raises(InputError, match=r"^fc\.weight must be finite.*1 of 128.*at \(2, 5\)"):
        nvfp4.quantize_weight(weight, name="fc.weight")


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.ones(4, 24), "divisible by 16 and not empty, weight has 24"),
        (torch.ones(4, 7), "divisible by 16 and not empty, weight has 7"),
        (torch.ones(4, 0), "none of them empty"),
        (torch.ones(0, 16), "none of them empty"),
        (torch.ones(16), "none of them empty"),
        (torch.ones(2, 16, 3), r"must have shape \[N, K\]"),
        (torch.ones(2, 16, dtype=torch.int32), "must be floating-point"),
    ],
)
def test_weight_of_a_wrong_shape(weight: torch.Tensor, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        nvfp4.quantize_weight(weight)


def test_input_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="the input has 20"):
        nvfp4.quantize_dequantize(torch.ones(2, 20), nvfp4.input_scale(1.0))


def test_operators_are_sound() -> None:
    stored = nvfp4.quantize_weight(torch.randn(4, 32))
    operators = torch.ops.vcompress
    torch.library.opcheck(
        operators.nvfp4_quantize_dequantize.default, (torch.randn(2, 3, 32), torch.tensor(0.01))
    )
    # The rest of opcheck does arithmetic on its arguments, which torch lacks for eight-bit floats.
    torch.library.opcheck(
        operators.nvfp4_dequantize.default,
        (stored.packed, stored.block_scale, stored.tensor_scale),
        test_utils=("test_faketensor", "test_aot_dispatch_static"),
    )
