"""The dialect of ONNX Runtime on NVIDIA GPUs, from the TensorRT one: four-bit weights, W4A16.

ONNX Runtime has no product of integers there: QuantizeLinear and DequantizeLinear run as arithmetic
of their own, and INT8 products fall back to the CPU with copies. What it has is `MatMulNBits`, a
product of a float16 input and a weight of four bits in groups. So that is what this takes: layers
in INT4, and float16 everywhere else. The kernel is also there on a CPU, where it can be checked.
Source: ONNX Runtime's contrib operators (com.microsoft.MatMulNBits).

Shapes: a weight `[N, K]` in groups of G is stored as bytes `[N, K / G, G / 2]`, the first of two
values in the low half, each eight more than it stands for; scales are `[N, K / G]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from vcompress.spec.errors import BuildError

__all__ = ["for_onnxruntime_cuda"]

_DOMAIN = "com.microsoft"
_ZERO_POINT = 8
_BITS = 4


def for_onnxruntime_cuda(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in the TensorRT dialect with INT4 weights alone, with MatMulNBits in their place.

    Still in float32; `model` is used up.

    Raises:
        BuildError: an INT4 weight is used otherwise than in the product of a linear layer.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in graph.node for name in node.output}
    gone: list[onnx.NodeProto] = []
    for node in list(graph.node):
        weight = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != TensorProto.INT4:
            continue
        scale = makers.get(node.input[1])
        scales = stored[node.input[1] if scale is None else scale.input[0]]
        for user in readers[node.output[0]]:
            if _is_product(user, node.output[0]):
                _replace(user, weight, scales, graph)
                continue
            products = readers.get(user.output[0], [])
            if user.op_type != "Transpose" or not all(
                each.op_type == "MatMul" and each.input[1] == user.output[0] for each in products
            ):
                message = f"{node.name}: an INT4 weight that is no linear layer's; keep this layer"
                raise BuildError(message)
            for product in products:
                _replace(product, weight, scales, graph)
            gone.append(user)
        gone += [node, *([] if scale is None else [scale])]
    for node in gone:
        if node in graph.node:
            graph.node.remove(node)
    _drop_unread(graph)
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return model


def _is_product(node: onnx.NodeProto, weight: str) -> bool:
    """Whether `node` is x W' + b, as a linear layer on a matrix is written."""
    facts = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return (
        node.op_type == "Gemm" and node.input[1] == weight
        and facts.get("transB", 0) == 1 and facts.get("transA", 0) == 0
        and facts.get("alpha", 1.0) == facts.get("beta", 1.0) == 1.0
    )  # fmt: skip


def _replace(
    product: onnx.NodeProto, weight: TensorProto, scales: TensorProto, graph: onnx.GraphProto
) -> None:
    """Make `product`, a MatMul or a Gemm, a MatMulNBits with the weight `[N, K]`."""
    rows, columns = weight.dims
    values = numpy_helper.to_array(scales).astype(np.float32)
    groups = values.shape[1]
    names = [f"{weight.name}.blocks", f"{weight.name}.scales"]
    known = {tensor.name for tensor in graph.initializer}
    arrays: tuple[npt.NDArray[Any], ...] = (_bytes(weight, groups), values)
    for name, array in zip(names, arrays, strict=True):
        if name not in known:
            graph.initializer.append(numpy_helper.from_array(array, name))
    # Its inputs: x, weight, scales, zero points, an order of groups, bias.
    bias = ["", "", product.input[2]] if len(product.input) > 2 else []
    made = helper.make_node(
        "MatMulNBits", [product.input[0], *names, *bias], list(product.output), name=product.name,
        domain=_DOMAIN, K=columns, N=rows, bits=_BITS, block_size=columns // groups,
    )  # fmt: skip
    product.CopyFrom(made)


def _bytes(weight: TensorProto, groups: int) -> npt.NDArray[np.uint8]:
    rows, columns = weight.dims
    codes = (numpy_helper.to_array(weight).astype(np.int16) + _ZERO_POINT).astype(np.uint8)
    pairs = codes.reshape(rows, columns // 2, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << np.uint8(_BITS))
    return packed.reshape(rows, groups, -1)


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
