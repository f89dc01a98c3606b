"""Read from an ONNX file which precision each layer really has.

What stands here is found in the file alone: from every operator that carries a weight the graph is
followed back to the stored tensor, and the path says how it is stored and how the operator's other
input is quantized. Nothing is taken from the plan, so that the file can contradict it. Only the
layer's name comes from the name of the stored tensor, `<layer>.weight...`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto

from vcompress.export.patterns import UNKNOWN, PrecisionGraph
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

__all__ = ["FilePrecision", "LayerInFile", "read_precision"]

# Weight and input of a layer, where they do not go by the same word.
_FORMATS_OF_A_PAIR = {
    ("int8", "int8_token"): "int8_token",
    ("fp8_channel", "fp8_token"): "fp8_channel",
    **{(name, "float"): name for name in FORMATS if FORMATS[name].input_bits == 0},
}


@dataclass(frozen=True, kw_only=True)
class LayerInFile:
    """A layer as the file has it.

    Attributes:
        weight_format: a format of a plan, "float" or "unknown"; a weight with one INT8 scale a
            channel is "int8", whatever its input is.
        input_format: the same for the input of the operator; "int8_token" or "fp8_token" where
            each token has a scale of its own.
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
        known = _FORMATS_OF_A_PAIR.get((self.weight_format, self.input_format))
        if known is not None or self.weight_format == self.input_format:
            return known or self.weight_format
        return f"{self.weight_format} weight with {self.input_format} input"


@dataclass(frozen=True)
class ProductInFile:
    """A product of two activations: the formats and the names of its operands."""

    formats: tuple[str, str]
    values: tuple[str, str]

    @property
    def format(self) -> str:
        """One word if both operands agree, as a plan means it; else both."""
        left, right = self.formats
        return left if left == right else f"{left} with {right}"


@dataclass(frozen=True, kw_only=True)
class FilePrecision:
    """What `read_precision` found.

    Attributes:
        layers: by the full name of the layer.
        unnamed: operators that multiply by something stored whose name tells no layer, such as a
            table of positions, by that name.
        initializer_bytes: bytes of all stored tensors, by element type in the words of ONNX.
        products: every product of two activations, such as those of attention, in the order of the
            graph.
    """

    layers: Mapping[str, LayerInFile]
    unnamed: Mapping[str, LayerInFile]
    initializer_bytes: Mapping[str, int]
    products: tuple[ProductInFile, ...] = ()

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
    graph = PrecisionGraph(model.graph)
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
    products = tuple(
        ProductInFile(
            formats=(graph.input_format(node.input[0]), graph.input_format(node.input[1])),
            values=(node.input[0], node.input[1]),
        )
        for node in graph.products()
    )
    return FilePrecision(
        layers=layers, unnamed=unnamed, initializer_bytes=_bytes(graph.stored.values()),
        products=products,
    )  # fmt: skip


def _joined(first: LayerInFile, second: LayerInFile) -> LayerInFile:
    """One entry for a layer that the model calls more than once."""
    return LayerInFile(
        weight_format=first.weight_format
        if first.weight_format == second.weight_format
        else UNKNOWN,
        input_format=first.input_format if first.input_format == second.input_format else UNKNOWN,
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
