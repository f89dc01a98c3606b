from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from vcompress.compress.numerics import fp8


def reference(x: torch.Tensor) -> torch.Tensor:
    """By the casts of ml_dtypes, a token at a time."""
    tokens = x.flatten(0, -2).numpy()
    scale = np.abs(tokens).max(-1, keepdims=True) / np.float32(448)
    scale = np.where(scale == 0, np.float32(1), np.maximum(scale, np.float32(2.0**-100)))
    codes = np.clip(tokens / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32) * scale).view(x.shape)


def test_equals_the_casts_of_ml_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 4, 50, generator=generator)
    x *= torch.exp2(torch.randint(-80, 80, (512, 4, 1), generator=generator))
    x[0], x[1, 0] = 0, 2.0**-120
    assert torch.equal(fp8.quantize_dequantize_per_token(x), reference(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_type_and_layout(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, dtype=dtype).T
    rounded = fp8.quantize_dequantize_per_token(x)
    assert rounded.dtype == dtype
    assert rounded.is_contiguous()
    assert torch.equal(rounded, reference(x.float().contiguous()).to(dtype))
    assert fp8.quantize_dequantize_per_token(torch.empty(0, 4)).shape == (0, 4)


def test_a_token_does_not_touch_another() -> None:
    x = torch.ones(4, 8)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -3e38
    rounded = fp8.quantize_dequantize_per_token(x)
    assert bool(rounded[0].isnan().all())
    assert rounded[1, 1] == 2.0**126
    assert rounded[2, 2] == -(2.0**126)
    assert torch.equal(rounded[3], x[3])
