"""Read from an ONNX file which precision each layer really has.

What stands here is found in the file alone: from every operator that carries a weight the graph is
followed back to the stored tensor, and the path says how it is stored and how the operator's other
input is quantized. Nothing is taken from the plan, so that the file can contradict it. Only the
layer's name comes from the name of the stored tensor, `<layer>.weight...`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto

from vcompress.spec.errors import InputError

__all__ = ["FilePrecision", "LayerInFile", "read_precision"]

_CARRIERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# They move or retype values and change none.
_TRANSPARENT = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_CODES: dict[int, str] = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}
_CENTRE_OF_UINT8 = 128
_NVFP4_BLOCK = 16
_PAIR_TABLE_SHAPE = [256, 2]
# Anything that no rule here recognizes; it equals no format of a plan.
_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class LayerInFile:
    """A layer as the file has it.

    Attributes:
        weight_format: "nvfp4", "int8", "fp8", "float" or "unknown".
        input_format: the same for the input of the operator.
        operators: the operators that use the weight, by type.
        input_values: names of the values that enter them, in the order of the graph.
    """

    weight_format: str
    input_format: str
    operators: tuple[str, ...]
    input_values: tuple[str, ...]

    @property
    def format(self) -> str:
        """One word if weight and input agree, as a plan means it; else both."""
        if self.weight_format == self.input_format:
            return self.weight_format
        return f"{self.weight_format} weight with {self.input_format} input"


@dataclass(frozen=True, kw_only=True)
class FilePrecision:
    """What `read_precision` found.

    Attributes:
        layers: by the full name of the layer.
        unnamed: operators that multiply by something stored whose name tells no layer, such as a
            table of positions, by that name.
        initializer_bytes: bytes of all stored tensors, by element type in the words of ONNX.
    """

    layers: Mapping[str, LayerInFile]
    unnamed: Mapping[str, LayerInFile]
    initializer_bytes: Mapping[str, int]

    @property
    def formats(self) -> dict[str, str]:
        """Layer -> format, to be compared with a plan, where "float" is "keep"."""
        return {name: layer.format for name, layer in self.layers.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Format -> number of layers."""
        return dict(Counter(self.formats.values()))


def read_precision(path: Path, *, prefix: str = "") -> FilePrecision:
    """Find the format of every layer in the ONNX file `path`; external data is not read.

    Args:
        path: of the file.
        prefix: taken off the layers' names, for instance that of a module around the model.

    Raises:
        InputError: the file is not ONNX or has no graph.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decoder and the file system have a dozen between them
        message = f"cannot read {path} as ONNX: {error}; export it again"
        raise InputError(message) from error
    if not model.graph.node:
        message = f"{path} holds no graph; export it again"
        raise InputError(message)
    graph = _Graph(model.graph)
    layers: dict[str, LayerInFile] = {}
    unnamed: dict[str, LayerInFile] = {}
    for node, weight, other in graph.carriers():
        weight_format, stored = graph.weight_format(weight)
        found = LayerInFile(
            weight_format=weight_format,
            input_format=graph.input_format(other),
            operators=(node.op_type,),
            input_values=(other,),
        )
        layer, _, buffer = stored.rpartition(".")
        named = buffer.startswith("weight")
        name = layer.removeprefix(prefix) if named else stored
        group = layers if named else unnamed
        group[name] = _joined(group[name], found) if name in group else found
    return FilePrecision(
        layers=layers, unnamed=unnamed, initializer_bytes=_bytes(graph.stored.values())
    )


def _joined(first: LayerInFile, second: LayerInFile) -> LayerInFile:
    """One entry for a layer that the model calls more than once."""
    return LayerInFile(
        weight_format=first.weight_format
        if first.weight_format == second.weight_format
        else _UNKNOWN,
        input_format=first.input_format if first.input_format == second.input_format else _UNKNOWN,
        operators=first.operators + second.operators,
        input_values=first.input_values + second.input_values,
    )


def _bytes(tensors: Iterable[TensorProto]) -> dict[str, int]:
    """Bytes by element type, from shapes: the data may lie in another file."""
    bits: Counter[str] = Counter()
    for tensor in tensors:
        element_type = ir.DataType(tensor.data_type)
        bits[element_type.name.lower()] += math.prod(tensor.dims) * element_type.bitwidth
    return {name: (total + 7) // 8 for name, total in bits.items()}


class _Graph:
    """A graph indexed by value names, which are unique over all its subgraphs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.stored: dict[str, TensorProto] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        # Values that depend on no input of the graph.
        self.constants: set[str] = set()
        self._index(graph)

    def _index(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
            self.constants.add(tensor.name)
        for node in graph.node:
            subgraphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            for subgraph in subgraphs:
                self._index(subgraph)
            self.nodes.append(node)
            self.producers.update(dict.fromkeys(node.output, node))
            inputs = [name for name in node.input if name]
            if not subgraphs and all(name in self.constants for name in inputs):
                self.constants.update(node.output)

    def carriers(self) -> Iterator[tuple[onnx.NodeProto, str, str]]:
        """Every operator with a weight: the operator, its weight, its other operand."""
        for node in self.nodes:
            if node.op_type not in _CARRIERS:
                continue
            left, right = node.input[0], node.input[1]
            if right in self.constants and left not in self.constants:
                yield node, right, left
            elif left in self.constants and right not in self.constants:
                yield node, left, right

    def weight_format(self, value: str) -> tuple[str, str]:
        """The format in which a weight is stored, and the name of the stored tensor."""
        origin = self._origin(value)
        if origin in self.stored:
            is_float = self.stored[origin].data_type in _FLOATS
            return ("float" if is_float else _UNKNOWN), origin
        node = self.producers[origin]
        if node.op_type == "DequantizeLinear":
            return self._dequantized_format(node)
        return self._unpacked_format(node)

    def input_format(self, value: str) -> str:
        """The format to which the input of an operator is rounded."""
        node = self.producers.get(self._origin(value))
        if node is None:
            return "float"
        if node.op_type == "Mul" and self._rounds_to_nvfp4(node):
            return "nvfp4"
        if node.op_type != "DequantizeLinear":
            return "float"
        source = self.producers.get(self._origin(node.input[0]))
        if source is None:
            return _UNKNOWN
        if source.op_type == "TRT_FP4DynamicQuantize":
            return "nvfp4" if _integer(source, "block_size") == _NVFP4_BLOCK else _UNKNOWN
        if source.op_type != "QuantizeLinear":
            return _UNKNOWN
        zero_point = self.stored.get(source.input[2]) if len(source.input) > 2 else None
        if zero_point is None:
            return _CODES.get(_integer(source, "output_dtype"), _UNKNOWN)
        if zero_point.data_type == TensorProto.UINT8:
            # Unsigned codes around 128 stand for the same numbers as signed ones around 0.
            is_centred = bool((onnx.numpy_helper.to_array(zero_point) == _CENTRE_OF_UINT8).all())
            return "int8" if is_centred else _UNKNOWN
        return _CODES.get(zero_point.data_type, _UNKNOWN)

    def _origin(self, value: str) -> str:
        """Follow `value` back through operators that change no values."""
        while (node := self.producers.get(value)) and node.op_type in _TRANSPARENT:
            value = node.input[0]
        return value

    def _producer(self, value: str, op_type: str) -> onnx.NodeProto | None:
        """The operator that makes `value`, moves aside, if it is an `op_type`."""
        node = self.producers.get(self._origin(value))
        return node if node is not None and node.op_type == op_type else None

    def _type_of(self, value: str) -> int | None:
        """Element type of the stored tensor behind `value`, if there is one."""
        tensor = self.stored.get(self._origin(value))
        return None if tensor is None else tensor.data_type

    def _dequantized_format(self, node: onnx.NodeProto) -> tuple[str, str]:
        name = self._origin(node.input[0])
        code_type = self._type_of(name)
        if code_type == TensorProto.FLOAT4E2M1:
            scale = self._producer(node.input[1], "DequantizeLinear")
            is_nvfp4 = (
                _integer(node, "block_size") == _NVFP4_BLOCK
                and scale is not None
                and self._type_of(scale.input[0]) == TensorProto.FLOAT8E4M3FN
            )
            return ("nvfp4" if is_nvfp4 else _UNKNOWN), name
        return _CODES.get(code_type or 0, _UNKNOWN), name

    def _unpacked_format(self, node: onnx.NodeProto) -> tuple[str, str]:
        """The portable form of NVFP4: bytes looked up in a table, times a product of scales."""
        look_up = self._producer(node.input[0], "Gather") if node.op_type == "Mul" else None
        scale = self._producer(node.input[1], "Mul") if look_up is not None else None
        if look_up is None or scale is None:
            return _UNKNOWN, node.output[0]
        table, name = self.stored.get(look_up.input[0]), self._origin(look_up.input[1])
        is_nvfp4 = (
            table is not None
            and list(table.dims) == _PAIR_TABLE_SHAPE
            and self._type_of(name) == TensorProto.UINT8
            and self._type_of(scale.input[0]) == TensorProto.FLOAT8E4M3FN
        )
        return ("nvfp4" if is_nvfp4 else _UNKNOWN), name

    def _rounds_to_nvfp4(self, node: onnx.NodeProto) -> bool:
        """Whether `node` multiplies rounded elements with scales that were cast to E4M3."""
        elements = self._producer(node.input[0], "Mul")
        scale = self._producer(node.input[1], "Mul")
        if elements is None or scale is None:
            return False
        if self._producer(elements.input[0], "Round") is None:
            return False
        casts = []
        value = scale.input[0]
        while (cast := self.producers.get(value)) and cast.op_type == "Cast":
            casts.append(_integer(cast, "to"))
            value = cast.input[0]
        return TensorProto.FLOAT8E4M3FN in casts


def _integer(node: onnx.NodeProto, name: str) -> int:
    """An integer attribute, 0 if it is absent."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
