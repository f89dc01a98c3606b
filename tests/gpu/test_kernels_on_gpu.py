"""What only a GPU can check: compiled kernels, graphs, and times that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels.attention import ExecutableAttention
from vcompress.compress.kernels.execute import execute
from vcompress.compress.kernels.linear import ExecutableLinear
from vcompress.compress.kernels.operators import block_rounded, rounded_tokens
from vcompress.compress.numerics import fp8, int8, mxfp4, mxfp8, nvfp4
from vcompress.models.load import load_model
from vcompress.pipeline.timing import measure_latency
from vcompress.spec.attention_section import PRODUCT_FORMATS, AttentionChoice
from vcompress.spec.formats import FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("sizes", [(37, 128, 33), (300, 512, 256), (1, 384, 64)])
def test_a_layer_computes_what_is_simulated(format: str, sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    torch.manual_seed(0)
    layer = freeze(nn.Linear(k, n), format, 4.0)
    assert isinstance(layer, FrozenLinear)
    x = torch.randn(m, k)
    expected = layer(x)
    on = ExecutableLinear(layer).cuda()
    scale = expected.abs().max()
    assert (on(x.cuda()).cpu() - expected).abs().max() < 2e-3 * scale
    assert (on(x.cuda().bfloat16()).cpu().float() - expected).abs().max() < 2e-2 * scale


def test_rounding_is_that_of_the_numerics() -> None:
    x = torch.randn(64, 512) * 3
    codes, scale = rounded_tokens(x.cuda(), torch.int8, None)
    assert torch.equal(
        (codes.float() * scale[:, None]).cpu(), int8.quantize_dequantize_per_token(x)
    )
    codes, scale = rounded_tokens(x.cuda(), torch.float8_e4m3fn, None)
    found = (codes.float() * scale[:, None]).cpu()
    assert torch.equal(found, fp8.quantize_dequantize_per_token(x))
    tensor_scale = nvfp4.input_scale(9.0)
    found = block_rounded(x.cuda(), tensor_scale.cuda(), "nvfp4").float().cpu() * tensor_scale
    torch.testing.assert_close(found, nvfp4.quantize_dequantize(x, tensor_scale), rtol=2e-7, atol=0)
    for kind, numerics in (("mxfp8", mxfp8), ("mxfp4", mxfp4)):
        found = block_rounded(x.cuda(), None, kind).float().cpu()
        assert torch.equal(found, numerics.quantize_dequantize(x))


@pytest.mark.parametrize("format", list(PRODUCT_FORMATS))
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_as_exact_as_its_simulation(format: str, is_causal: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 333, 64) for _ in range(3)]
    amax = [float(part.abs().amax()) for part in parts]
    choice = AttentionChoice(
        format=format, reason="", query_amax=amax[0], key_amax=amax[1], value_amax=amax[2],
        smooth_keys=True,
    )  # fmt: skip
    simulated = AttentionProducts(choice)
    exact = functional.scaled_dot_product_attention(*parts, is_causal=is_causal)
    expected = (simulated(*parts, is_causal=is_causal) - exact).norm()
    made = ExecutableAttention(simulated).cuda()
    found = made(*(part.cuda() for part in parts), is_causal=is_causal).cpu()
    assert (found - exact).norm() < 1.25 * expected


def test_compiled_and_captured() -> None:
    formats = ("int8_token", "int8", "fp8_channel", "fp8", "nvfp4", "mxfp8", "int4_g128")
    model = nn.Sequential(*(freeze(nn.Linear(256, 256), each, 4.0) for each in formats))
    execute(model, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(x).float()
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            found = compiled(x).float().clone()
    # A value between two codes may fall to either side in another order of additions.
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_table_is_measured(tmp_path: Path) -> None:
    model = load_model("reference:penvideo20")
    formats = ("int8_token", "fp8", "nvfp4")
    table = measure_latency(model, tmp_path / "t.json", formats=formats, device="cuda")
    assert table.source == "measured"
    assert {*formats, "keep"} <= set(table.formats)
