"""Layers on packed weights compute what simulated ones do: Triton's interpreter, and torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels import available
from vcompress.compress.kernels.execute import execute, resident_bytes
from vcompress.compress.kernels.layout import half_chunk, pack, stored
from vcompress.compress.kernels.linear import ExecutableLinear, FourBitInputs
from vcompress.compress.kernels.operators import block_rounded, rounded_tokens
from vcompress.compress.numerics import fp8, int8, mxfp4, mxfp8, nvfp4
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.formats import FORMATS

ODD = (7, 48, 33)
EVEN = (16, 128, 32)


@pytest.fixture(params=["triton", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(available, "interpreted", lambda: request.param == "triton")
    return str(request.param)


def frozen(format: str, sizes: tuple[int, int, int], rotation: int | None = None) -> FrozenLinear:
    _, inputs, outputs = sizes
    torch.manual_seed(3)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight[1] *= 30.0
        layer.weight[2] = 0.0
    made = freeze(layer, format, 3.5, rotation=rotation)
    assert isinstance(made, FrozenLinear)
    return made


def tokens(sizes: tuple[int, int, int]) -> torch.Tensor:
    x = torch.randn(sizes[0], sizes[1], generator=torch.Generator().manual_seed(1))
    x[0] = 0.0
    x[1] *= 100.0
    return x


def fits(format: str, sizes: tuple[int, int, int]) -> bool:
    return FORMATS[format].objection("linear", (sizes[2], sizes[1])) is None


CASES = [
    (format, sizes) for format in FORMATS for sizes in (ODD, EVEN, (5, 64, 17))
    if fits(format, sizes)
]  # fmt: skip


@pytest.mark.parametrize(("format", "sizes"), CASES)
def test_a_layer_computes_what_is_simulated(
    format: str, sizes: tuple[int, int, int], way: str
) -> None:
    layer, x = frozen(format, sizes), tokens(sizes)
    expected = layer(x)
    found = ExecutableLinear(layer)(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    # The order of the additions differs, nothing else.
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def test_everything_a_line_can_have(way: str) -> None:
    layer = frozen("nvfp4", EVEN, rotation=16)
    layer.input_smoothing = torch.rand(EVEN[1]) + 0.5
    layer.low_rank_down, layer.low_rank_up = torch.randn(4, EVEN[1]), torch.randn(EVEN[2], 4)
    x = tokens(EVEN).view(2, 8, -1)
    torch.testing.assert_close(ExecutableLinear(layer)(x), layer(x), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("format", ["nvfp4", "int8_token", "fp8_channel", "int4_g32"])
def test_half_precision_is_at_least_as_exact_as_the_simulation(format: str, way: str) -> None:
    layer = frozen(format, EVEN)
    x = tokens(EVEN).bfloat16()
    exact = layer(x.float())
    found = ExecutableLinear(layer)(x)
    assert found.dtype == torch.bfloat16
    loss, simulated = ((each.float() - exact).norm() for each in (found, layer(x)))
    assert loss < 1.05 * simulated


@pytest.mark.parametrize("inputs", ["float", "fp8", "int8"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4_g32"])
@pytest.mark.parametrize("sizes", [EVEN, (3, 96, 21)])
def test_other_inputs_of_four_bit_weights(
    format: str, inputs: FourBitInputs, sizes: tuple[int, int, int], way: str
) -> None:
    layer, x = frozen(format, sizes), tokens(sizes)
    made = ExecutableLinear(layer, inputs)
    weight = layer.dequantized_weight()
    given = {
        "float": lambda: x, "fp8": lambda: fp8.quantize_dequantize_per_token(x),
        "int8": lambda: int8.quantize_dequantize_per_token(x),
    }[inputs]()  # fmt: skip
    if inputs != "float":
        numerics = int8 if inputs == "int8" else fp8
        again = {} if inputs == "int8" else {"per_channel": True}
        weight = numerics.fake_quantize_weight(weight, **again)
    expected = nn.functional.linear(given, weight, layer.bias)
    # A weight can lie between two codes, and then the last bit of its unit decides.
    bar = 1e-5 if inputs == "float" else 4e-3
    assert (made(x) - expected).norm() < bar * expected.norm()


def test_codes_are_those_of_the_numerics(way: str) -> None:
    x = tokens((9, 100, 0))
    x[3, 5], x[4, 6] = float("inf"), 1e-30
    for numerics, code_type in ((int8, torch.int8), (fp8, torch.float8_e4m3fn)):
        codes, scale = rounded_tokens(x, code_type, None)
        expected = numerics.quantize_dequantize_per_token(x)
        assert torch.equal(codes.float() * scale[:, None], expected)
        static = numerics.input_scale(2.0)
        codes, scale = rounded_tokens(x, code_type, static)
        rounded = (
            int8.quantize_dequantize(x, static, 0)
            if numerics is int8
            else fp8.quantize_dequantize(x, static)
        )
        assert torch.equal(codes.float() * scale, rounded)
    x[2, 2] = float("nan")
    codes, scale = rounded_tokens(x, torch.int8, None)
    assert (codes.float() * scale[:, None])[2].isnan().all()


def test_blocks_are_those_of_the_numerics(way: str) -> None:
    x = tokens((9, 96, 0))
    x[2, 7] = 1e-38
    scale = nvfp4.input_scale(3.0)
    found = block_rounded(x, scale, "nvfp4").float() * scale
    torch.testing.assert_close(found, nvfp4.quantize_dequantize(x, scale), rtol=2e-7, atol=0)
    assert torch.equal(block_rounded(x, None, "mxfp8").float(), mxfp8.quantize_dequantize(x))
    assert torch.equal(block_rounded(x, None, "mxfp4").float(), mxfp4.quantize_dequantize(x))
    x[1, 1] = float("nan")
    bad = block_rounded(x, scale, "nvfp4").isnan()
    assert bad[1, :16].all()
    assert bad.sum() == 16


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_layout_goes_back(format: str) -> None:
    for inputs in (128, 384):
        buffers = frozen(format, (1, inputs, 6)).stored_weight
        again = stored(pack(buffers, format), inputs)
        assert again.keys() == buffers.keys()
        for name, buffer in buffers.items():
            assert again[name].dtype == buffer.dtype
            assert torch.equal(again[name].float(), buffer.float())


def test_a_layer_takes_the_memory_of_its_format() -> None:
    layer = frozen("nvfp4", (1, 256, 512))
    made = ExecutableLinear(layer)
    assert half_chunk(256) == 64
    assert made.weight_bits == layer.weight_bits
    assert torch.equal(made.weight, layer.weight)
    model = nn.Sequential(nn.Linear(256, 512, dtype=torch.bfloat16))
    assert resident_bytes(model) / resident_bytes(nn.Sequential(made)) > 3.4


def test_execute_swaps_every_layer_and_says_so(way: str) -> None:
    shared = frozen("int8", (1, 32, 32))
    convolution = freeze(nn.Conv1d(2, 2, 3), "int8", 1.0)
    model = nn.Sequential(shared, nn.Sequential(shared, frozen("mxfp8", (1, 32, 16))), convolution)
    lines = execute(model, device="cpu")
    assert model[0] is model[1][0]
    assert [each.name for each in lines] == ["0", "1.1", "2"]
    assert lines[0].kernel == f"int8 x int8, {'Triton' if way == 'triton' else 'torch'}"
    assert [each.simulated for each in lines] == [False, False, True]
    before = model[0]
    execute(model)
    assert model[0] is before


def test_what_cannot_be_executed_says_why() -> None:
    with pytest.raises(InputError, match="apply a plan first"):
        execute(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="four_bit_inputs must be one of"):
        execute(nn.Sequential(frozen("int8", EVEN)), four_bit_inputs="int5")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(MissingCapabilityError, match="there is no GPU"):
            execute(nn.Sequential(frozen("int8", EVEN)), device="cuda")


def test_no_data_decides_what_is_traced() -> None:
    model = nn.Sequential(
        *(frozen(format, (1, 64, 64)) for format in ("int8_token", "fp8", "nvfp4"))
    )
    execute(model)
    x = torch.randn(3, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
