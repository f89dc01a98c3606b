"""Read an ONNX file as a model that can be compressed, or say why it is none.

An ONNX file holds no code: reading it runs nothing. Its external data must lie beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcompress.models.graphs.operators import OPERATORS
from vcompress.spec import strict_json
from vcompress.spec.errors import InputError, VcompressError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OnnxFile", "read_onnx"]

_OLDEST_OPSET = 11
_FLOAT_TYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "QLinear",
              "MatMulNBits", "MatMulBnb4", "DynamicQuantize", "QAttention", "QGemm",
              "Quantize")  # fmt: skip
LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What an ONNX file holds.

    Attributes:
        path: of the file.
        model: its graph, functions inlined.
        input_name, input_shape, dtype: of its one input; a free axis is a name or None.
        output_shape: of the output that counts, the first.
        half: weights are stored with 16 bits.
        opset: of the default domain.
        own: what vcompress wrote into the metadata, empty for files of others.
    """

    path: Path
    model: ir.Model
    input_name: str
    input_shape: tuple[int | str | None, ...]
    dtype: str
    output_shape: tuple[int | str | None, ...]
    half: bool
    opset: int
    own: Mapping[str, Any] = field(default_factory=dict)


def read_onnx(path: Path) -> OnnxFile:
    """Read and check `path`.

    Raises:
        InputError: damaged, quantized already, several inputs, or operators that are not known.
    """
    model = _load(path)
    graph, own = model.graph, _own(model, path)
    _refuse_quantized(model, path, own)
    _refuse_unknown(model, path)
    names = {value.name for value in graph.inputs} - set(graph.initializers)
    inputs = [value for value in graph.inputs if value.name in names]
    if len(inputs) != 1:
        listed = ", ".join(str(value.name) for value in inputs) or "none"
        message = (
            f"{path} has {len(inputs)} inputs ({listed}); a graph of clips has one. A model of "
            "several tensors is compressed from its module, with recorded calls"
        )
        raise InputError(message)
    (value,) = inputs
    known = {**_FLOAT_TYPES, 2: "uint8"}
    if value.shape is None or value.dtype is None or int(value.dtype) not in known:
        message = (
            f"{path}: input {value.name} is {value.dtype} of shape {value.shape}; clips are "
            "floating point or uint8 with five axes"
        )
        raise InputError(message)
    halves = (10, 16)
    return OnnxFile(
        path=path, model=model, input_name=str(value.name), input_shape=_sizes(value),
        dtype=known[int(value.dtype)], output_shape=_sizes(graph.outputs[0]),
        half=any(
            one.const_value is not None and int(one.const_value.dtype) in halves
            for one in graph.initializers.values()
        ),
        opset=model.opset_imports.get("", 0), own=own,
    )  # fmt: skip


def _sizes(value: ir.Value) -> tuple[int | str | None, ...]:
    if value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def _load(path: Path) -> ir.Model:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common

    if not path.is_file():
        message = f"{path}: no such file"
        raise InputError(message)
    try:
        # The checker wants the path where weights lie in other files.
        onnx.checker.check_model(str(path))
        model = ir.load(path)
        if model.opset_imports.get("", 0) < 13:
            proto = onnx.version_converter.convert_version(onnx.load(str(path)), 17)
            model = ir.from_proto(proto)
        common.InlinePass()(model)
    except Exception as error:
        # Protobuf, the checker and the converter each have errors of their own.
        lines = str(error).strip().splitlines()
        message = (
            f"{path} is damaged or no ONNX file of opset {_OLDEST_OPSET} or later: "
            f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
        )
        raise InputError(message) from error
    if not model.graph.outputs:
        message = f"{path} has no output"
        raise InputError(message)
    return model


def _nodes(model: ir.Model) -> Counter[str]:
    return Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )


def _refuse_quantized(model: ir.Model, path: Path, own: Mapping[str, Any]) -> None:
    if "target" in own:
        # Portable graphs unpack formats such as NVFP4 with plain arithmetic.
        message = (
            f"{path} is quantized already: the graph of an artifact for {own['target']}; give "
            "what that was made from"
        )
        raise InputError(message)
    found = {
        name: count
        for name, count in _nodes(model).items()
        if any(word in name for word in _QUANTIZED)
    }
    stored = [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and "FLOAT4" in value.const_value.dtype.name
    ]
    if found or stored:
        listed = ", ".join(f"{name} x{count}" for name, count in found.items())
        message = (
            f"{path} is quantized already ({listed or f'{len(stored)} weights in four bits'}); "
            "give the floating-point graph that it was made from"
        )
        raise InputError(message)


def _refuse_unknown(model: ir.Model, path: Path) -> None:
    unknown = {
        name: count
        for name, count in _nodes(model).items()
        if name not in OPERATORS and name not in LAYERS and name != "Constant"
    }
    if unknown:
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(unknown.items()))
        message = (
            f"{path} has operators that are not translated: {listed}. Export the model without "
            "control flow and runtime-specific fusions, or give its module instead"
        )
        raise InputError(message)


def _own(model: ir.Model, path: Path) -> Mapping[str, Any]:
    text = model.metadata_props.get("vcompress")
    if text is None:
        return {}
    try:
        facts = strict_json.parse(text, f"{path}: metadata_props")
    except VcompressError:
        return {}
    return facts if isinstance(facts, dict) else {}
