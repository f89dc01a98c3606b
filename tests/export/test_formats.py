"""Every format in every dialect, alone and with all that a layer can have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from vcompress.compress.frozen import freeze
from vcompress.compress.numerics import fp8, int8, mxfp4, mxfp8
from vcompress.export.dialects.tensorrt import TENSORRT
from vcompress.export.engine import build_engine
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.export.readback import read_precision
from vcompress.export.runtime import INTEGER_KERNELS, open_session
from vcompress.export.ties import count_ties
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

K, N = 128, 24
IN_TENSORRT = [format for format in FORMATS if format not in TENSORRT.refused]
# Alone, and with all that a layer can have.
CASES = [
    *((format, "portable", False) for format in FORMATS),
    *((format, "portable", True) for format in FORMATS),
    *((format, "tensorrt", True) for format in IN_TENSORRT),
]
# ONNX Runtime knows no operator of the domain `trt`.
FOR_TENSORRT_ONLY = ("nvfp4", "mxfp8")
Exporter = Callable[[str, str, bool], tuple[nn.Module, GraphFacts]]


def everything() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_smoothing": torch.rand(K, generator=generator) + 0.5,
        "low_rank_down": torch.randn(4, K, generator=generator) / 8,
        "low_rank_up": torch.randn(N, 4, generator=generator) / 8,
        "bias": torch.randn(N, generator=generator),
    }


def named(layer: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(fc=layer)).eval()


def module_in(format: str, *, with_everything: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(K, N)
    if not with_everything:
        return named(freeze(layer, format, 4.0))
    return named(freeze(layer, format, 4.0, rotation=32, tensors=everything()))


def inputs() -> list[torch.Tensor]:
    """Two inputs; tokens that are all zero, and of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(size, 5, K, generator=generator) for size in (1, 3))
    first[0, 0] = 0
    second[1] *= 1e-6
    second[2, 3, 7] = 1000
    return [first, second]


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(open_session(path).run(x.numpy()))


def check_parity(path: Path, module: nn.Module, inputs: list[torch.Tensor]) -> None:
    for x in inputs:
        with torch.no_grad():
            expected = module(x)
        ties = count_ties(module, path, x.numpy())
        assert ties.num_unexplained == 0
        assert ties.forced_relative_l2 <= 1e-5
        if ties.num_differing == 0:
            assert (run(path, x) - expected).norm() / expected.norm() <= 1e-5
        assert ties.num_differing <= 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """A layer in a format and its file in a dialect, made once."""
    folder = tmp_path_factory.mktemp("formats")
    made: dict[tuple[str, str, bool], tuple[nn.Module, GraphFacts]] = {}

    def get(format: str, dialect: str, with_everything: bool) -> tuple[nn.Module, GraphFacts]:
        key = (format, dialect, with_everything)
        if key not in made:
            module = module_in(format, with_everything=with_everything)
            path = folder / f"{format}.{dialect}.{with_everything}.onnx"
            made[key] = (module, export_onnx(module, inputs()[0], path, dialect=dialect))
        return made[key]

    return get


@pytest.mark.parametrize(("format", "dialect", "with_everything"), CASES)
def test_onnx_runtime_computes_what_torch_computes(
    exported: Exporter, format: str, dialect: str, with_everything: bool
) -> None:
    module, facts = exported(format, dialect, with_everything)
    assert facts.input_shape[0] == "batch"
    only_tensorrt = dialect == "tensorrt" and format in FOR_TENSORRT_ONLY
    assert bool(facts.own_operators) == only_tensorrt
    if not only_tensorrt:
        check_parity(facts.files[0], module, inputs())


@pytest.mark.parametrize(("format", "dialect", "with_everything"), CASES)
def test_the_file_tells_its_format(
    exported: Exporter, format: str, dialect: str, with_everything: bool
) -> None:
    path = exported(format, dialect, with_everything)[1].files[0]
    found = read_precision(path)
    assert found.formats == {"fc": format}
    extras = ["fc.low_rank_down", "fc.low_rank_up", "fc.rotation"] if with_everything else []
    assert sorted(found.unnamed) == extras
    # What is stored takes the bits that the format says, none in float.
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    data = sum(
        len(tensor.raw_data) for name, tensor in stored.items() if name.startswith("fc.weight")
    )
    assert data * 8 == FORMATS[format].weight_bits((N, K))


@pytest.mark.parametrize("format", IN_TENSORRT)
def test_tensorrt_builds(exported: Exporter, tmp_path: Path, format: str) -> None:
    path = exported(format, "tensorrt", True)[1].files[0]
    facts = build_engine(path, tmp_path / "m.engine", sm="120")
    assert facts.inputs[0].shape == (-1, 5, K)


def test_what_tensorrt_has_no_place_for_is_named_before_any_work(tmp_path: Path) -> None:
    layers = OrderedDict(
        first=freeze(nn.Linear(K, K), "mxfp4", None), second=freeze(nn.Linear(K, K), "mxfp8", None),
        third=freeze(nn.Linear(K, K), "mxfp4", None),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"mxfp4: TensorRT has neither .*; first, third$"):
        export_onnx(
            nn.Sequential(layers), torch.randn(2, K), tmp_path / "m.onnx", dialect="tensorrt"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
def test_all_formats_in_one_graph(tmp_path: Path, dialect: str) -> None:
    torch.manual_seed(0)
    formats = [format for format in FORMATS if dialect == "portable" or format in IN_TENSORRT]
    module = nn.Sequential(
        OrderedDict((name, freeze(nn.Linear(K, K), name, 1.0, rotation=16)) for name in formats)
    )
    path = tmp_path / "m.onnx"
    export_onnx(module, torch.randn(2, K), path, dialect=dialect)
    assert read_precision(path).formats == {name: name for name in formats}
    # One Hadamard matrix serves all.
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert len([name for name in names if name.endswith("rotation")]) == 1
    if dialect == "tensorrt":
        build_engine(path, tmp_path / "m.engine", sm="120")
    else:
        ties = count_ties(module, path, torch.randn(3, K).numpy())
        assert ties.num_unexplained == 0
        assert ties.forced_relative_l2 <= 1e-5


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
def test_a_smoothed_convolution_with_another_bias(
    tmp_path: Path, format: str, dialect: str
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv3d(64, 8, (1, 2, 2), stride=(1, 2, 2))
    tensors = {"input_smoothing": torch.rand(64) + 0.5, "bias": torch.randn(8)}
    module = named(freeze(layer, format, 4.0, tensors=tensors))
    path, x = tmp_path / "m.onnx", torch.randn(2, 64, 2, 4, 4)
    export_onnx(module, x, path, dialect=dialect)
    check_parity(path, module, [x, torch.randn(1, 64, 2, 4, 4)])
    assert read_precision(path).formats == {"fc": format}


@pytest.mark.parametrize("format", ["mxfp8", "fp8_channel", "int4_g64"])
def test_half_precision(tmp_path: Path, format: str) -> None:
    torch.manual_seed(0)
    layer = freeze(nn.Linear(K, N).half(), format, 4.0, rotation=32, tensors=everything())
    module, x = named(layer), torch.randn(4, K).half()
    export_onnx(module, x, tmp_path / "m.onnx", dialect="portable")
    result, expected = run(tmp_path / "m.onnx", x).float(), module(x).float()
    assert (result - expected).norm() / expected.norm() < 5e-3
    assert read_precision(tmp_path / "m.onnx").formats == {"fc": format}


class RoundTrip(nn.Module):
    """Quantization of an input alone."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operators = {
            "mxfp4": mxfp4.quantize_dequantize,
            "mxfp8": mxfp8.quantize_dequantize,
            "int8_token": int8.quantize_dequantize_per_token,
            "fp8_channel": fp8.quantize_dequantize_per_token,
        }
        rounded: torch.Tensor = operators[self.format](x)
        return rounded


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8", "int8_token", "fp8_channel"])
def test_dynamic_scales_round_to_the_same_values(tmp_path: Path, format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**11, 16, 32, generator=generator)
    x = (x * torch.exp2(torch.randint(-60, 60, (2**11, 16, 1), generator=generator))).flatten(1)
    # Largest values at, just below and just above those that make the scale a power of two.
    for row, factor in enumerate((1.0, 1 - 2**-24, 1 + 2**-23)):
        largest = 448 if "8" in format else 6
        x[10 + row] = largest * 2.0 ** (row - 5) * factor * torch.linspace(-1, 1, 512)
    x[0], x[1], x[2] = 0, 1e-42, 3e38
    x[3, 0], x[3, 40] = torch.inf, -torch.inf
    x[4, :32], x[5, :32] = 2.0**-110, 2.0**-95
    module = RoundTrip(format)
    export_onnx(module, x[:2], tmp_path / "m.onnx", dialect="portable")
    assert torch.equal(run(tmp_path / "m.onnx", x), module(x))
    # A NaN stays, in its token; integers cannot carry it.
    x = torch.ones(2, 512)
    x[0, 3] = torch.nan
    result = run(tmp_path / "m.onnx", x)
    assert bool(result[0, 3].isnan()) or format == "int8_token"
    assert bool(result[1].isfinite().all())


def test_only_static_int8_runs_in_integers(exported: Exporter) -> None:
    # A stored INT8 weight with a float input must not meet a kernel that rounds the input anew.
    for format in ("int8", "int8_token"):
        kernels = set(open_session(exported(format, "portable", False)[1].files[0]).kernels())
        assert bool(kernels & INTEGER_KERNELS) == (format == "int8")
        assert "MatMulNBits" not in kernels


def test_four_bits_have_their_own_types_in_tensorrt(exported: Exporter) -> None:
    kinds = {"nvfp4": TensorProto.FLOAT4E2M1, "int4_g64": TensorProto.INT4}
    opsets = {"nvfp4": 23, "int4_g64": 21}
    for format, kind in kinds.items():
        module, facts = exported(format, "tensorrt", True)
        assert facts.opset == opsets[format]
        stored = {tensor.name: tensor for tensor in onnx.load(facts.files[0]).graph.initializer}
        packed = stored["fc.weight_packed"]
        assert packed.data_type == kind
        assert list(packed.dims) == [N, K]
        layer = module.get_submodule("fc")
        assert packed.raw_data == layer.weight_packed.numpy().tobytes()
        if format == "int4_g64":
            codes = onnx.numpy_helper.to_array(packed).astype("float32").reshape(N, 2, 64)
            scale = onnx.numpy_helper.to_array(stored["fc.weight_scale"]).astype("float32")
            values = torch.from_numpy((codes * scale[..., None]).reshape(N, K))
            assert torch.equal(values, layer.dequantized_weight())
