"""Attention on eight-bit codes computes what is simulated, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.kernels import available
from vcompress.compress.kernels.attention import ExecutableAttention
from vcompress.spec.attention_section import PRODUCT_FORMATS, AttentionChoice


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "interpreted", lambda: True)


def operands(
    queries: int, keys: int, width: int, value_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return (
        torch.randn(1, 2, queries, width, generator=random),
        torch.randn(1, 2, keys, width, generator=random) + 1.0,
        torch.randn(1, 2, keys, value_width, generator=random) + 0.3,
    )


def products(format: str, parts: tuple[torch.Tensor, ...]) -> AttentionProducts:
    query, key, value = (float(part.abs().amax()) for part in parts)
    return AttentionProducts(AttentionChoice(
        format=format, reason="", query_amax=query, key_amax=key, value_amax=value,
        smooth_keys=True,
    ))  # fmt: skip


@pytest.mark.parametrize("format", list(PRODUCT_FORMATS))
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", [(7, 13, 24, 20), (32, 32, 32, 32)])
def test_one_tile_computes_what_is_simulated(
    format: str, is_causal: bool, sizes: tuple[int, int, int, int]
) -> None:
    parts = operands(*sizes)
    simulated = products(format, parts)
    expected = simulated(*parts, is_causal=is_causal)
    found = ExecutableAttention(simulated)(*parts, is_causal=is_causal)
    # A probability between two codes may fall to either.
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("format", list(PRODUCT_FORMATS))
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_tiles_are_as_exact(format: str, is_causal: bool) -> None:
    parts = operands(70, 90, 40, 24)
    simulated = products(format, parts)
    exact = functional.scaled_dot_product_attention(*parts, is_causal=is_causal)
    found = ExecutableAttention(simulated)(*parts, is_causal=is_causal)
    loss, expected = (
        (each - exact).norm() for each in (found, simulated(*parts, is_causal=is_causal))
    )
    assert 0 < loss < 1.25 * expected
    assert expected < 0.1 * exact.norm()


def test_what_the_kernel_does_not_take_stays_simulated() -> None:
    parts = operands(5, 6, 16, 16)
    simulated = products("int8_fp8", parts)
    mask = torch.ones(5, 6, dtype=torch.bool).tril(2)
    made = ExecutableAttention(simulated)
    assert torch.equal(made(*parts, attn_mask=mask), simulated(*parts, attn_mask=mask))
    assert made.kernel == "int8 scores, fp8 values, Triton"
    assert isinstance(made, nn.Module)
    assert made(*(part.bfloat16() for part in parts)).dtype == torch.bfloat16
