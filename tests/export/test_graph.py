from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.frozen import FrozenLayer, freeze
from vcompress.compress.numerics import fp8, int8, nvfp4
from vcompress.export import graph
from vcompress.export.engine import build_engine
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.export.ties import count_ties
from vcompress.spec.errors import BuildError, InputError

Exporter = Callable[[str, str, str], Any]
CASES = [
    *(("tiny", format) for format in ("float", "int8", "fp8", "nvfp4")),
    *((name, format) for name in ("videomae", "vivit") for format in ("int8", "nvfp4")),
]
FLOAT4E2M1, FLOAT8E4M3FN = onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(open_session(path).run(x.numpy()))


def relative_l2(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def check_parity(path: Path, module: nn.Module, inputs: list[torch.Tensor], limit: float) -> None:
    for x in inputs:
        assert relative_l2(run(path, x), module(x)) <= limit


def inputs_like(clips: torch.Tensor, *batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [1.2 * torch.randn(size, *clips.shape[1:], generator=generator) for size in batches]


@torch.no_grad()
def check_quantized_parity(path: Path, module: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Equal but for rounding ties, each of which is counted; with the same codes, equal as floats.

    One tie in an early layer moves the output by 1e-2 in these untrained models.
    """
    for x in inputs:
        ties = count_ties(module, path, x.numpy())
        assert ties.forced_relative_l2 <= 1e-5
        assert ties.num_unexplained == 0
        assert ties.num_differing <= ties.num_values / 1000
        difference = relative_l2(run(path, x), module(x))
        assert difference <= (1e-3 if ties.num_differing == 0 else 5e-2)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_portable_equals_torch(
    exported: Exporter, clips: torch.Tensor, name: str, format: str
) -> None:
    made = exported(name, format, "portable")
    if format == "float":
        check_parity(made.path, made.module, inputs_like(clips, 1, 3), 1e-5)
    else:
        check_quantized_parity(made.path, made.module, inputs_like(clips, 1, 3))


@pytest.mark.parametrize("format", ["float", "int8", "fp8"])
def test_tensorrt_dialect_without_fp4_runs_in_onnx_runtime(
    exported: Exporter, clips: torch.Tensor, format: str
) -> None:
    made = exported("tiny", format, "tensorrt")
    if format == "float":
        check_parity(made.path, made.module, inputs_like(clips, 1, 3), 1e-5)
    else:
        check_quantized_parity(made.path, made.module, inputs_like(clips, 1, 3))


@pytest.mark.parametrize(
    ("name", "format"),
    [case for case in CASES if case[0] == "tiny"] + [("videomae", "nvfp4"), ("vivit", "nvfp4")],
)
def test_tensorrt_dialect_builds_an_engine(
    exported: Exporter, tmp_path: Path, name: str, format: str
) -> None:
    engine = tmp_path / "m.engine"
    facts = build_engine(exported(name, format, "tensorrt").path, engine, sm="120")
    assert facts.inputs[0].name == "pixel_values"
    assert facts.inputs[0].shape[0] == -1
    assert engine.stat().st_size > 0


def test_facts(exported: Exporter) -> None:
    facts = exported("tiny", "nvfp4", "portable").facts
    assert facts.dialect == "portable"
    assert facts.input_shape == ("batch", 4, 3, 16, 16)
    assert facts.output_shape == ("batch", 5)
    assert facts.static_reason is None
    model = onnx.load(facts.files[0])
    assert facts.num_nodes == len(model.graph.node)
    assert facts.num_bytes == facts.files[0].stat().st_size
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("task", "classify")]
    assert model.producer_name == "vcompress"


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_weights_stay_quantized_in_the_file(exported: Exporter, format: str, dialect: str) -> None:
    made = exported("tiny", format, dialect)
    stored = {tensor.name: tensor for tensor in onnx.load(made.path).graph.initializer}
    types = {"int8": onnx.TensorProto.INT8, "fp8": FLOAT8E4M3FN}
    for name, layer in made.module.named_modules():
        if not isinstance(layer, FrozenLayer):
            continue
        if layer.format == "nvfp4":
            is_native = dialect == "tensorrt"
            packed = stored[f"{name}.weight_packed"]
            assert packed.data_type == (FLOAT4E2M1 if is_native else onnx.TensorProto.UINT8)
            assert packed.raw_data == layer.weight_packed.numpy().tobytes()
            assert stored[f"{name}.weight_block_scale"].data_type == FLOAT8E4M3FN
        else:
            assert stored[f"{name}.weight_quantized"].data_type == types[layer.format]
    # The float weights of these layers would take 4 bytes a value.
    floats = exported("tiny", "float", dialect).facts.num_bytes
    assert made.facts.num_bytes < 0.45 * floats


def test_four_bit_file_holds_the_values_of_torch(exported: Exporter) -> None:
    # The tensorrt file decoded by onnx itself: codes times block scales times tensor scale.
    made = exported("tiny", "nvfp4", "tensorrt")
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float32)
        for tensor in onnx.load(made.path).graph.initializer
    }
    codes = stored["qkv.weight_packed"].reshape(192, 4, 16)
    scale = stored["qkv.weight_block_scale"] * stored["qkv.weight_tensor_scale"]
    expected = made.module.get_submodule("qkv").dequantized_weight().numpy()
    np.testing.assert_array_equal((codes * scale[..., None]).reshape(192, 64), expected)


def test_operators_of_each_dialect(exported: Exporter) -> None:
    def operators(format: str, dialect: str) -> tuple[Counter[str], int]:
        model = onnx.load(exported("tiny", format, dialect).path)
        return Counter(node.op_type for node in model.graph.node), model.opset_import[0].version

    portable, opset = operators("nvfp4", "portable")
    assert opset == 20
    # The stem is INT8, since NVFP4 takes no convolution.
    assert (portable["QuantizeLinear"], portable["DequantizeLinear"]) == (1, 2)
    native, opset = operators("nvfp4", "tensorrt")
    assert opset == 23
    assert native["TRT_FP4DynamicQuantize"] == 3
    assert native["QuantizeLinear"] == 1
    # Two for each NVFP4 weight, two for each NVFP4 input, and two of the INT8 stem.
    assert native["DequantizeLinear"] == 3 * 4 + 2
    assert "Attention" not in native
    assert native["Softmax"] == 1
    assert operators("int8", "tensorrt")[1] <= 22


def test_zero_points_are_zero(exported: Exporter) -> None:
    # TensorRT refuses others.
    for format in ("int8", "fp8"):
        model = onnx.load(exported("tiny", format, "tensorrt").path)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert len(quantizers) == 4
        for node in quantizers:
            assert not onnx.numpy_helper.to_array(stored[node.input[2]]).astype(np.float32).any()


def test_nothing_of_this_machine_is_in_the_file(exported: Exporter) -> None:
    data = exported("videomae", "nvfp4", "portable").path.read_bytes()
    for trace in (b"site-packages", b".py", str(Path.home()).encode(), b"stack_trace"):
        assert trace not in data


class RoundTrip(nn.Module):
    """Quantization of an input alone."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format
        self.register_buffer(
            "scale", {"nvfp4": nvfp4, "int8": int8, "fp8": fp8}[format].input_scale(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.format == "int8":
            return int8.quantize_dequantize(x, self.scale, 0)
        if self.format == "fp8":
            return fp8.quantize_dequantize(x, self.scale)
        return nvfp4.quantize_dequantize(x, self.scale)


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_inputs_round_to_the_same_values(tmp_path: Path, format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**11, 32, 16, generator=generator)
    x = (x * torch.exp2(torch.randint(-12, 4, (2**11, 32, 1), generator=generator))).flatten(1)
    x[0], x[1], x[2] = 0, 1e-42, 3e38
    x[3, 0], x[3, 17] = torch.inf, -torch.inf
    module = RoundTrip(format)
    export_onnx(module, x[:2], tmp_path / "m.onnx", dialect="portable")
    assert torch.equal(run(tmp_path / "m.onnx", x), module(x))


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_nan_stays_nan(tmp_path: Path, format: str) -> None:
    x = torch.ones(2, 32)
    x[0, 3] = torch.nan
    export_onnx(RoundTrip(format), x, tmp_path / "m.onnx", dialect="portable")
    result = run(tmp_path / "m.onnx", x)
    assert bool(result[0, 3].isnan())
    assert bool(result[1].isfinite().all())


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_half_precision_model(tmp_path: Path, format: str, dialect: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(freeze(nn.Linear(64, 32).half(), format, 4.0), nn.GELU()).eval()
    x = torch.randn(4, 64).half()
    path = tmp_path / "m.onnx"
    export_onnx(module, x, path, dialect=dialect)
    if dialect == "tensorrt":
        build_engine(path, tmp_path / "m.engine", sm="120")
    else:
        result = run(path, x)
        assert result.dtype == torch.float16
        assert relative_l2(result, module(x)) < 2e-3


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("mask", torch.rand(8, 8) > 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = dict(self.options)
        if options.pop("mask", None) == "bool":
            options["attn_mask"] = self.mask | torch.eye(8, dtype=torch.bool)
        elif self.options.get("mask"):
            options["attn_mask"] = self.mask.to(x.dtype)
        return functional.scaled_dot_product_attention(x, x * 2, x + 1, **options)


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ((8, 16), {"scale": 0.3}),
        ((2, 8, 16), {"is_causal": True}),
        ((2, 8, 16), {"mask": "bool"}),
        ((3, 2, 8, 16), {"mask": "float"}),
    ],
)
def test_attention(tmp_path: Path, axes: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = Attention(**options), torch.randn(2, *axes)
    export_onnx(module, x, tmp_path / "m.onnx", dialect="portable")
    check_parity(tmp_path / "m.onnx", module, [x, torch.randn(3, *axes)], 1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, bias=False), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2), (2, 4, 9, 9)),
        # The exporter's own translation gives this one a bias of shape [6, 2].
        (nn.Conv3d(4, 6, 3, dilation=(1, 2, 1), padding=(1, 2, 1), bias=False), (2, 4, 3, 9, 9)),
    ],
)
@pytest.mark.parametrize("format", ["float", "int8"])
def test_convolutions(
    tmp_path: Path, layer: nn.Module, shape: tuple[int, ...], format: str
) -> None:
    module = layer if format == "float" else freeze(layer, format, 4.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    export_onnx(module, x, tmp_path / "m.onnx", dialect="portable")
    check_parity(tmp_path / "m.onnx", module, [x, torch.randn(shape, generator=generator)], 1e-5)


class Batch(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(16, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.drop(self.layer(x))
        match self.kind:
            case "unrolled":
                return torch.stack([y[index] for index in range(y.shape[0])])
            case "merged":
                return y.mean(0, keepdim=True)
            case "data":
                return y if x.sum() > 0 else -y
            case "two":
                return y, y
        return y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unrolled", "torch.export: .*specialized it to be a constant"),
        ("merged", "the first axis of the output does not follow the batch size"),
    ],
)
def test_fixed_batch_has_a_reason(tmp_path: Path, kind: str, reason: str) -> None:
    module, x = Batch(kind), torch.randn(3, 16)
    facts = export_onnx(module, x, tmp_path / "m.onnx", dialect="portable")
    assert facts.input_shape == (3, 16)
    assert facts.static_reason is not None
    assert re.match(reason, facts.static_reason)
    assert "\n" not in facts.static_reason
    check_parity(tmp_path / "m.onnx", module.eval(), [x, -x], 1e-5)


def test_fixed_batch_on_request(tmp_path: Path) -> None:
    facts = export_onnx(
        Batch("plain"), torch.randn(1, 16), tmp_path / "m.onnx", dialect="portable",
        dynamic_batch=False, input_name="clip", output_name="logits",
    )  # fmt: skip
    assert (facts.input_shape, facts.output_shape) == ((1, 16), (1, 8))
    assert facts.static_reason == "a fixed batch size was asked for"
    model = onnx.load(facts.files[0])
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("clip", "logits")


def test_evaluates_and_leaves_the_mode(tmp_path: Path) -> None:
    module, x = Batch("plain").train(), torch.randn(2, 16)
    module.layer.eval()
    export_onnx(module, x, tmp_path / "m.onnx", dialect="portable")
    assert (module.training, module.layer.training, module.drop.training) == (True, False, True)
    check_parity(tmp_path / "m.onnx", module.eval(), [x, -x], 1e-5)


def test_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    export_onnx(Batch("unrolled"), torch.randn(2, 16), tmp_path / "m.onnx", dialect="portable")
    with pytest.raises(BuildError):
        export_onnx(Batch("data"), torch.randn(2, 16), tmp_path / "n.onnx", dialect="portable")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Batch("data"), r"torch.export cannot trace Batch at shape \[2, 16\]: Could not guard"),
        (Batch("two"), "Batch must return one tensor to be exported, got 2"),
        (Attention(dropout_p=0.5), "cannot translate the model: attention with dropout or"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, module: nn.Module, problem: str) -> None:
    with pytest.raises(BuildError, match=problem):
        export_onnx(module, torch.randn(2, 16), tmp_path / "m.onnx", dialect="portable")
    assert list(tmp_path.iterdir()) == []


def test_unknown_dialect(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown dialect 'onnx'; choose one of: portable, tens"):
        export_onnx(Batch("plain"), torch.randn(2, 16), tmp_path / "m.onnx", dialect="onnx")


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
def test_large_weights_go_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_BYTES", 1000)
    torch.manual_seed(0)
    module, x = freeze(nn.Linear(64, 64), "nvfp4", 4.0), torch.randn(2, 64)
    path = tmp_path / "m.onnx"
    facts = export_onnx(module, x, path, dialect=dialect)
    assert facts.files == (path, tmp_path / "m.onnx.data")
    assert sorted(tmp_path.iterdir()) == list(facts.files)
    assert facts.files[1].stat().st_size >= 64 * 32
    if dialect == "tensorrt":
        build_engine(path, tmp_path / "m.engine", sm="120")
    else:
        check_parity(path, module, [x, -x], 1e-5)


def test_an_older_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")
    export_onnx(Batch("plain"), torch.randn(2, 16), path, dialect="portable")
    onnx.checker.check_model(str(path))
    assert list(tmp_path.iterdir()) == [path]


class Pooled(nn.Module):
    """A convolution and a mean, for clips of any size; `fixed` ties it to one."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv3d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.register_buffer("places", torch.zeros(4, 1, 16, 16) if fixed else torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem((x + self.places).transpose(1, 2)).mean((2, 3, 4)))


FREE = {"pixel_values": {1: "frames", 3: "height", 4: "width"}}


@torch.no_grad()
def test_frames_height_and_width_may_be_free(tmp_path: Path) -> None:
    module, path = Pooled(fixed=False).eval(), tmp_path / "m.onnx"
    facts = export_onnx(
        module, torch.randn(1, 4, 3, 16, 16), path, dialect="portable", free_axes=FREE
    )
    assert facts.input_shape == ("batch", "frames", 3, "height", "width")
    assert facts.output_shape == ("batch", 5)
    check_parity(path, module, [torch.randn(3, 6, 3, 24, 10), torch.randn(1, 2, 3, 8, 8)], 1e-5)


def test_an_axis_that_the_model_fixes_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"free frames, height, width: .*size\(\)\[1\].*constant"):
        export_onnx(
            Pooled(fixed=True).eval(), torch.randn(1, 4, 3, 16, 16), tmp_path / "m.onnx",
            dialect="portable", free_axes=FREE,
        )  # fmt: skip
