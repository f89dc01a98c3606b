"""The patterns by which an ONNX graph tells the formats of its weights and inputs.

What: each rule here matches how one dialect writes one format, by operators, element types, shapes
and block sizes. What matches no rule is "float" if it is plainly that, else "unknown", which equals
no format of a plan. Values of large tensors are never read: they may lie in another file.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

__all__ = ["UNKNOWN", "PrecisionGraph"]

UNKNOWN = "unknown"
_CARRIERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# They move or retype values and change none.
_TRANSPARENT = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_CODES: dict[int, str] = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}
_CENTRE_OF_UINT8 = 128
_NVFP4_BLOCK = 16
_SMALLEST_E4M3 = 2.0**-9
_MX_BLOCK = 32
_INT4_GROUPS = (32, 64, 128)
_PAIR_TABLE_SHAPE = [256, 2]
_POWER_TABLE_SHAPE = [256]
# Element type, type of the scales and block size of what the portable dialect unpacks.
_UNPACKED: dict[tuple[int, str, int], str] = {
    (TensorProto.UINT8, "e4m3", _NVFP4_BLOCK): "nvfp4",
    (TensorProto.UINT8, "e8m0", _MX_BLOCK): "mxfp4",
    (TensorProto.FLOAT8E4M3FN, "e8m0", _MX_BLOCK): "mxfp8",
    **{(TensorProto.UINT8, "float16", size): f"int4_g{size}" for size in _INT4_GROUPS},
}


class PrecisionGraph:
    """A graph indexed by value names, which are unique over all its subgraphs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.stored: dict[str, TensorProto] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        # Divisions by their divisor: whatever is rounded with a computed scale is divided by it.
        self.quotients: dict[str, onnx.NodeProto] = {}
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
            if node.op_type == "Div":
                self.quotients[node.input[1]] = node
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

    def products(self) -> Iterator[onnx.NodeProto]:
        """Every MatMul of two operands that both depend on an input, in the order of the graph."""
        for node in self.nodes:
            if node.op_type == "MatMul" and not self.constants.intersection(node.input):
                yield node

    def weight_format(self, value: str) -> tuple[str, str]:
        """The format in which a weight is stored, and the name of the stored tensor."""
        origin = self._origin(value)
        if origin in self.stored:
            is_float = self.stored[origin].data_type in _FLOATS
            return ("float" if is_float else UNKNOWN), origin
        node = self.producers[origin]
        if node.op_type == "DequantizeLinear":
            return self._dequantized_format(node)
        if node.op_type == "TRT_MXFP8DequantizeLinear":
            name = self._origin(node.input[0])
            is_mxfp8 = (
                self._type_of(name) == TensorProto.FLOAT8E4M3FN
                and self._type_of(node.input[1]) == TensorProto.UINT8
                and _integer(node, "block_size") == _MX_BLOCK
            )
            return ("mxfp8" if is_mxfp8 else UNKNOWN), name
        return self._unpacked_format(node)

    def input_format(self, value: str) -> str:
        """The format to which the input of an operator is rounded."""
        node = self.producers.get(self._origin(value))
        if node is None:
            return "float"
        if node.op_type == "Mul":
            return self._multiplied_format(node)
        if node.op_type == "TRT_MXFP8DequantizeLinear":
            source = self._producer(node.input[0], "TRT_MXFP8DynamicQuantize")
            blocks = {_integer(each, "block_size") for each in (node, source) if each is not None}
            return "mxfp8" if source is not None and blocks == {_MX_BLOCK} else UNKNOWN
        if node.op_type != "DequantizeLinear":
            return "float"
        return self._quantized_format(node)

    def _quantized_format(self, node: onnx.NodeProto) -> str:
        """The format of an input that the DequantizeLinear `node` gives."""
        source = self.producers.get(self._origin(node.input[0]))
        if source is None:
            return UNKNOWN
        if source.op_type == "TRT_FP4DynamicQuantize":
            return "nvfp4" if _integer(source, "block_size") == _NVFP4_BLOCK else UNKNOWN
        if source.op_type != "QuantizeLinear":
            return UNKNOWN
        zero_point = self.stored.get(source.input[2]) if len(source.input) > 2 else None
        if zero_point is None:
            return _CODES.get(_integer(source, "output_dtype"), UNKNOWN)
        if zero_point.data_type == TensorProto.UINT8:
            # Unsigned codes around 128 stand for the same numbers as signed ones around 0.
            is_centred = bool((onnx.numpy_helper.to_array(zero_point) == _CENTRE_OF_UINT8).all())
            return "int8" if is_centred else UNKNOWN
        return _CODES.get(zero_point.data_type, UNKNOWN)

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

    def _dims_of(self, value: str) -> list[int] | None:
        """Shape of the stored tensor behind `value`, if there is one."""
        tensor = self.stored.get(self._origin(value))
        return None if tensor is None else list(tensor.dims)

    def _dequantized_format(self, node: onnx.NodeProto) -> tuple[str, str]:
        """The formats of weights behind DequantizeLinear, and the name of what is stored."""
        name = self._origin(node.input[0])
        code_type, block_size = self._type_of(name), _integer(node, "block_size")
        if code_type == TensorProto.FLOAT4E2M1:
            scale = self._producer(node.input[1], "DequantizeLinear")
            is_nvfp4 = (
                block_size == _NVFP4_BLOCK
                and scale is not None
                and self._type_of(scale.input[0]) == TensorProto.FLOAT8E4M3FN
            )
            return ("nvfp4" if is_nvfp4 else UNKNOWN), name
        if code_type == TensorProto.INT4:
            is_int4 = block_size in _INT4_GROUPS and self._type_of(node.input[1]) in _FLOATS
            return (f"int4_g{block_size}" if is_int4 else UNKNOWN), name
        if block_size:
            return UNKNOWN, name
        format = _CODES.get(code_type or 0, UNKNOWN)
        if format == "fp8" and self._dims_of(node.input[1]):
            return "fp8_channel", name
        return format, name

    def _unpacked_format(self, node: onnx.NodeProto) -> tuple[str, str]:
        """The portable form of four bits and of MX: elements times the scales of their blocks."""
        if node.op_type != "Mul":
            return UNKNOWN, node.output[0]
        look_up, name = self._producer(node.input[0], "Gather"), self._origin(node.input[0])
        values_a_code = 1
        if look_up is not None:
            table, name = self.stored.get(look_up.input[0]), self._origin(look_up.input[1])
            if table is None or list(table.dims) != _PAIR_TABLE_SHAPE:
                return UNKNOWN, name
            values_a_code = 2
        codes = self._dims_of(name)
        if codes is None:
            return UNKNOWN, node.output[0]
        scale, block = self._stored_scale(node.input[1])
        sizes = self._dims_of(block)
        if not sizes or len(codes) != 2 or len(sizes) != 2:
            return UNKNOWN, name
        block_size = codes[1] * values_a_code // sizes[1]
        return _UNPACKED.get((self._type_of(name) or 0, scale, block_size), UNKNOWN), name

    def _stored_scale(self, value: str) -> tuple[str, str]:
        """How the scales of blocks are stored, in a word, and the name of what is stored."""
        product, look_up = self._producer(value, "Mul"), self._producer(value, "Gather")
        if product is not None:
            is_e4m3 = self._type_of(product.input[0]) == TensorProto.FLOAT8E4M3FN
            return ("e4m3" if is_e4m3 else UNKNOWN), self._origin(product.input[0])
        if look_up is not None:
            is_e8m0 = (
                self._dims_of(look_up.input[0]) == _POWER_TABLE_SHAPE
                and self._type_of(look_up.input[1]) == TensorProto.UINT8
            )
            return ("e8m0" if is_e8m0 else UNKNOWN), self._origin(look_up.input[1])
        is_half = self._type_of(value) == TensorProto.FLOAT16
        return ("float16" if is_half else UNKNOWN), self._origin(value)

    def _multiplied_format(self, node: onnx.NodeProto) -> str:
        """The format of an input that is rounded elements times computed scales."""
        elements, scale = node.input[0], node.input[1]
        quotient = self.quotients.get(scale)
        if quotient is None:
            return "float"
        dequantize = self._producer(elements, "DequantizeLinear")
        if dequantize is not None:
            quantize = self._producer(dequantize.input[0], "QuantizeLinear")
            is_token = quantize is not None and quantize.input[0] == quotient.output[0]
            return f"{self._quantized_format(dequantize)}_token" if is_token else UNKNOWN
        product = self._producer(elements, "Mul")
        is_e4m3 = self._is_e4m3(elements)
        is_rounded = product is not None and self._producer(product.input[0], "Round") is not None
        is_e2m1 = is_rounded and not is_e4m3
        blocks = self._block_size(quotient.input[0])
        if self._is_power_of_two(scale) and blocks == _MX_BLOCK and is_e2m1 != is_e4m3:
            return "mxfp4" if is_e2m1 else "mxfp8"
        product = self._producer(scale, "Mul")
        has_e4m3_scale = product is not None and self._is_e4m3(product.input[0])
        return "nvfp4" if is_e2m1 and has_e4m3_scale and blocks == _NVFP4_BLOCK else UNKNOWN

    def _is_e4m3(self, value: str) -> bool:
        """Whether `value` was rounded to E4M3: by a Cast, or to steps of at least 2^-9."""
        if TensorProto.FLOAT8E4M3FN in self._casts(value):
            return True
        product = self._producer(value, "Mul")
        rounded = None if product is None else self._producer(product.input[0], "Round")
        step = None if product is None else self._producer(product.input[1], "Max")
        least = None if step is None else self.stored.get(step.input[1])
        if rounded is None or least is None or least.data_location == TensorProto.EXTERNAL:
            return False
        return float(onnx.numpy_helper.to_array(least)) == _SMALLEST_E4M3

    def _casts(self, value: str) -> list[int]:
        """The types through which `value` was cast, one after another."""
        types = []
        while (cast := self.producers.get(value)) and cast.op_type == "Cast":
            types.append(_integer(cast, "to"))
            value = cast.input[0]
        return types

    def _block_size(self, value: str) -> int:
        """The last axis to which `value` was reshaped, 0 if it was not."""
        node = self.producers.get(value)
        shape = (
            None if node is None or node.op_type != "Reshape" else self.stored.get(node.input[1])
        )
        if shape is None or shape.data_location == TensorProto.EXTERNAL:
            return 0
        return int(onnx.numpy_helper.to_array(shape)[-1])

    def _is_power_of_two(self, scale: str) -> bool:
        """Whether `scale` was rounded up by a sum that drops everything below its highest bit."""
        product = self._producer(scale, "Mul")
        choice = None if product is None else self._producer(product.input[0], "Where")
        step = None if choice is None else self._producer(choice.input[2], "Sub")
        return step is not None and self._producer(step.input[0], "Add") is not None


def _integer(node: onnx.NodeProto, name: str) -> int:
    """An integer attribute, 0 if it is absent."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
