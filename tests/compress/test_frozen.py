from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from vcompress.compress.frozen import FrozenConvolution, FrozenLayer, FrozenLinear, freeze
from vcompress.compress.numerics import fp8, hadamard, int4, int8, mxfp4, mxfp8, nvfp4
from vcompress.compress.prepare import weight_to_store
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

FAKE = {
    "nvfp4": lambda x, amax: nvfp4.quantize_dequantize(x, nvfp4.input_scale(amax)),
    "int8": lambda x, amax: int8.quantize_dequantize(x, int8.input_scale(amax), 0),
    "fp8": lambda x, amax: fp8.quantize_dequantize(x, fp8.input_scale(amax)),
    "mxfp4": lambda x, _: mxfp4.quantize_dequantize(x),
    "mxfp8": lambda x, _: mxfp8.quantize_dequantize(x),
    "int8_token": lambda x, _: int8.quantize_dequantize_per_token(x),
    "fp8_channel": lambda x, _: fp8.quantize_dequantize_per_token(x),
    **{f"int4_g{size}": lambda x, _: x for size in int4.GROUP_SIZES},
}
WEIGHT = {
    "nvfp4": nvfp4.fake_quantize_weight,
    "int8": int8.fake_quantize_weight,
    "fp8": fp8.fake_quantize_weight,
    "mxfp4": mxfp4.fake_quantize_weight,
    "mxfp8": mxfp8.fake_quantize_weight,
    "int8_token": int8.fake_quantize_weight,
    "fp8_channel": partial(fp8.fake_quantize_weight, per_channel=True),
    **{
        f"int4_g{size}": partial(int4.fake_quantize_weight, group_size=size)
        for size in int4.GROUP_SIZES
    },
}
# Parts of the names of the operators that stand in a traced layer: of the input, of the weight.
OPERATORS = {
    "nvfp4": ("nvfp4_quantize_dequantize", "nvfp4_dequantize"),
    "mxfp4": ("mxfp4_quantize_dequantize", "mxfp4_dequantize"),
    "mxfp8": ("mxfp8_quantize_dequantize", "mxfp8_dequantize"),
    "fp8": ("fp8_quantize_dequantize", "fp8_dequantize"),
    "fp8_channel": ("fp8_quantize_dequantize_per_token", "fp8_dequantize"),
    "int8": ("int8_quantize_dequantize", "int8_dequantize"),
    "int8_token": ("int8_quantize_dequantize_per_token", "int8_dequantize"),
    **{f"int4_g{size}": ("int4_dequantize",) for size in int4.GROUP_SIZES},
}
K = 128


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def frozen(layer: nn.Module, format: str, amax: float = 4.0, **options: object) -> FrozenLayer:
    result = freeze(layer, format, amax, **options)
    assert isinstance(result, FrozenLayer)
    return result


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(format: str, bias: bool) -> None:
    layer = nn.Linear(K, 24, bias=bias)
    result = frozen(layer, format)
    assert isinstance(result, FrozenLinear)
    x = torch.randn(2, 5, K)
    expected = functional.linear(FAKE[format](x, 4.0), WEIGHT[format](layer.weight), layer.bias)
    assert torch.equal(result(x), expected)
    assert result.format == format
    assert result.weight_bits == FORMATS[format].weight_bits((24, K))


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 17)),
        (nn.Conv2d(6, 8, (3, 5), padding=(1, 2), dilation=(2, 1), groups=2), (2, 6, 9, 11)),
        (nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False), (1, 8, 7, 7)),
        (nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (2, 3, 4, 8, 8)),
        (nn.Conv3d(4, 6, 3, padding=1, dilation=(1, 2, 2)), (4, 5, 9, 9)),
    ],
)
def test_convolution(format: str, layer: nn.Conv3d, shape: tuple[int, ...]) -> None:
    result = frozen(layer, format)
    assert isinstance(result, FrozenConvolution)
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)
    expected.weight.data = WEIGHT[format](layer.weight.data)
    assert torch.equal(result(x), expected(FAKE[format](x, 4.0)))
    assert result.weight_bits == FORMATS[format].weight_bits(tuple(layer.weight.shape))


def test_smoothing_of_a_linear_layer() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(4, 32)
    x[:, 3] *= 100
    smoothing = 1 / x.abs().amax(0).sqrt()
    amax = (x * smoothing).abs().max().item()
    plain = frozen(layer, "int8", x.abs().max().item())
    smooth = frozen(layer, "int8", amax, tensors={"input_smoothing": smoothing})
    weight = int8.fake_quantize_weight(layer.weight / smoothing)
    expected = functional.linear(FAKE["int8"](x * smoothing, amax), weight, layer.bias)
    assert torch.equal(smooth(x), expected)
    errors = [(result(x) - layer(x)).norm() for result in (plain, smooth)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("groups", [1, 2])
def test_smoothing_of_a_convolution(groups: int) -> None:
    layer, x = nn.Conv2d(4, 6, 3, groups=groups), torch.randn(2, 4, 8, 8)
    smoothing = torch.tensor([1.0, 3.0, 0.5, 0.7])
    weight = layer.weight.detach().clone()
    for output in range(6):
        for inside in range(4 // groups):
            # Each group of outputs reads its own group of input channels.
            channel = output // (6 // groups) * (4 // groups) + inside
            weight[output, inside] /= smoothing[channel]
    expected = functional.conv2d(
        FAKE["int8"](x * smoothing.view(4, 1, 1), 4.0),
        int8.fake_quantize_weight(weight), layer.bias, groups=groups,
    )  # fmt: skip
    assert torch.equal(frozen(layer, "int8", tensors={"input_smoothing": smoothing})(x), expected)


def everything(num_inputs: int, num_outputs: int) -> dict[str, torch.Tensor]:
    return {
        "input_smoothing": torch.rand(num_inputs) + 0.5,
        "low_rank_down": torch.randn(4, num_inputs) / 8,
        "low_rank_up": torch.randn(num_outputs, 4) / 8,
        "bias": torch.randn(num_outputs),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_with_everything(format: str) -> None:
    layer, tensors, x = nn.Linear(K, 24), everything(K, 24), torch.randn(2, 5, K)
    result = frozen(layer, format, 4.0, rotation=32, tensors=tensors)
    smooth = x * tensors["input_smoothing"]
    branch = smooth @ tensors["low_rank_down"].T @ tensors["low_rank_up"].T
    blocks = torch.block_diag(*[hadamard.matrix(32)] * (K // 32))
    rest = layer.weight.detach() / tensors["input_smoothing"]
    rest = (rest - tensors["low_rank_up"] @ tensors["low_rank_down"]) @ blocks
    stored = weight_to_store(layer, 32, tensors, "fc")
    assert torch.allclose(stored, rest, atol=1e-6)
    rotated = hadamard.rotate(smooth, 32)
    assert torch.allclose(rotated, smooth @ blocks, atol=1e-5)
    expected = functional.linear(FAKE[format](rotated, 4.0), WEIGHT[format](stored))
    expected = expected + tensors["bias"] + branch
    assert torch.allclose(result(x), expected, atol=1e-5)
    # Without any rounding, smoothing, branch and rotation cancel out.
    exact = functional.linear(rotated, stored) + branch
    assert torch.allclose(exact, functional.linear(x, layer.weight), atol=1e-4)
    assert result.extra_bits == 32 * (K + 4 * K + 24 * 4)
    assert "rotation=32, rank=4" in repr(result)


def test_a_range_is_needed_by_static_scales_alone() -> None:
    for format in FORMATS:
        if FORMATS[format].needs_input_amax:
            with pytest.raises(InputError, match=rf"^fc\.weight: {format} needs input_amax"):
                freeze(nn.Linear(K, 8), format, None, name="fc")
        else:
            assert frozen(nn.Linear(K, 8), format, None).input_scale is None


@pytest.mark.parametrize("format", FORMATS)
def test_state_survives_safetensors(format: str, tmp_path: Path) -> None:
    first = frozen(nn.Linear(K, 8), format, rotation=16, tensors=everything(K, 8))
    second = frozen(nn.Linear(K, 8), format, 1.0, rotation=16, tensors=everything(K, 8))
    x = torch.randn(3, K)
    assert not torch.equal(first(x), second(x))
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    assert second.load_state_dict(load_file(tmp_path / "layer.safetensors")).missing_keys == []
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_model(format: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(K, 8).to(dtype)
    result, x = frozen(layer, format, rotation=16), torch.randn(3, K, dtype=dtype)
    assert result(x).dtype == dtype
    exact = frozen(copy.deepcopy(layer).float(), format, rotation=16)(x.float())
    # A value between two codes takes another one where the rotation was rounded to bfloat16.
    limit = 0.02 if FORMATS[format].input_bits in (0, 8) else 0.1
    assert (result(x).float() - exact).norm() / exact.norm() < limit
    assert result.bias is not None
    assert result.bias.dtype == torch.float32


@pytest.mark.parametrize("format", FORMATS)
def test_casting_the_model_keeps_the_format(format: str) -> None:
    result = frozen(nn.Linear(K, 8), format, rotation=16, tensors=everything(K, 8))
    before = {name: buffer.clone() for name, buffer in result.named_buffers()}
    nn.Sequential(result).half().double()
    for name, buffer in result.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.float(), before[name].float())
    assert {buffer.device.type for buffer in result.to("meta").buffers()} == {"meta"}


def test_the_layer_is_not_changed() -> None:
    layer = nn.Linear(32, 8)
    before = copy.deepcopy(layer.state_dict())
    result = frozen(layer, "int8", tensors={"input_smoothing": torch.full((32,), 2.0)})
    assert result.bias is not None
    result.bias += 1
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_input_that_was_always_zero() -> None:
    for format in FORMATS:
        result = frozen(nn.Linear(K, 8), format, 0.0)
        if FORMATS[format].needs_input_amax:
            exact = frozen(nn.Linear(K, 8), format, 1.0)
            assert torch.equal(result.input_scale, exact.input_scale)
        assert bool(result(torch.zeros(1, K)).isfinite().all())


def test_gradients_do_not_follow() -> None:
    result = frozen(nn.Linear(32, 8), "int8")
    assert sum(parameter.numel() for parameter in result.parameters()) == 0
    assert not result(torch.randn(1, 32)).requires_grad


# torch warns of its own use of its own trees.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_operators_survive_torch_export(format: str) -> None:
    layer = frozen(nn.Linear(K, 8), format, rotation=16, tensors=everything(K, 8))
    module, example = nn.Sequential(layer), torch.randn(2, K)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    ours = {target for target in targets if target.startswith("vcompress.")}
    assert ours == {f"vcompress.{name}.default" for name in OPERATORS[format]}
    x = torch.randn(5, K)
    assert torch.equal(program.module()(x), module(x))


def test_prints_its_format() -> None:
    assert "format=int8, weight_bits=2304" in repr(frozen(nn.Linear(32, 8), "int8"))


@pytest.mark.parametrize(
    ("layer", "format", "problem"),
    [
        (nn.Linear(20, 8), "nvfp4", r"^fc\.weight: nvfp4 needs a contraction size divisible"),
        (nn.Conv3d(16, 8, 1), "nvfp4", r"^fc\.weight: nvfp4 is defined for linear layers"),
        (
            nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
            "int8",
            "padding_mode is 'reflect'",
        ),
        (nn.ConvTranspose2d(4, 8, 3), "int8", "a linear layer or a convolution, got ConvTranspose"),
        (nn.LayerNorm(4), "int8", "^fc must be a linear layer or a convolution, got LayerNorm"),
        (nn.Linear(32, 8), "int3", "unknown format 'int3'; choose one of: nvfp4, mxfp4, mxfp8"),
    ],
)
def test_what_cannot_be_frozen(layer: nn.Module, format: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        freeze(layer, format, 1.0, name="fc")


@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0])
def test_input_range_must_be_a_magnitude(amax: float) -> None:
    with pytest.raises(InputError, match="input_amax"):
        freeze(nn.Linear(32, 8), "int8", amax)


def test_weight_that_is_not_finite() -> None:
    layer = nn.Linear(32, 8)
    layer.weight.data[1, 2] = math.nan
    with pytest.raises(InputError, match=r"^blocks\.0\.fc\.weight must be finite.*\(1, 2\)"):
        freeze(layer, "nvfp4", 1.0, name="blocks.0.fc")
    with pytest.raises(InputError, match=r"^weight of Linear\(in_features=32"):
        freeze(layer, "nvfp4", 1.0)


@pytest.mark.parametrize(
    ("smoothing", "problem"),
    [
        (torch.ones(8), r"one factor for each of the 32 input channels, got shape \[8\]"),
        (torch.zeros(32), "must be positive and finite"),
        (torch.full((32,), math.nan), "must be positive and finite"),
    ],
)
def test_smoothing_that_does_not_fit(smoothing: torch.Tensor, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        freeze(nn.Linear(32, 8), "int8", 1.0, tensors={"input_smoothing": smoothing})
