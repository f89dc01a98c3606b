"""Operators on integers that TensorRT has no kernels for, in others that give the same numbers.

What: bit shifts become products and exact divisions, and a sum into places that are computed
(`scatter_add`, as in a histogram) becomes a product of matrices. A place i is split into
i = h * L + l with L about the square root of the number of places; the one-hot matrices of h and l
are small, and the sums are (onehot(h) * values)^T onehot(l), of shape [H, L]. For P values and N
places it takes 2 P N operations, instead of P in a loop that no tensor core has.

Shapes: P values, N places, H * L >= N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from vcompress.export.dialects.dialect import Translation
from vcompress.export.dialects.standard import constant, op

__all__ = ["TRANSLATIONS"]


def _power(bits: int, example: Any) -> Any:
    return op.Cast(constant(2**bits, np.int64), to=example.dtype)


def _left_shift(x: Any, bits: int) -> Any:
    return op.Mul(x, _power(bits, x))


def _right_shift(x: Any, bits: int) -> Any:
    # Mod has the sign of the divisor, so the division is exact and rounds down, as a shift does.
    power = _power(bits, x)
    return op.Div(op.Sub(x, op.Mod(x, power)), power)


def _scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    """Along the last axis; `index` and `source` have the other sizes of `x`."""
    axes = len(x.shape)
    if dim % axes != axes - 1 or list(index.shape[:-1]) != list(x.shape[:-1]):
        message = "scatter_add along another axis than the last has no translation for TensorRT"
        raise NotImplementedError(message)
    places = int(x.shape[-1])
    width = math.isqrt(places - 1) + 1
    height = -(-places // width)
    last = constant([-1], np.int64)
    size = constant(width, np.int64)
    low = op.Mod(index, size)
    high = op.Div(op.Sub(index, low), size)
    rows, columns = (
        op.Cast(
            op.Equal(op.Unsqueeze(part, last), constant(np.arange(count), np.int64)),
            to=ir.DataType.FLOAT,
        )
        for part, count in ((high, height), (low, width))
    )
    values = op.Unsqueeze(op.Cast(source, to=ir.DataType.FLOAT), last)
    turned = list(range(axes + 1))
    turned[-2:] = turned[:-3:-1]
    sums = op.MatMul(op.Transpose(op.Mul(rows, values), perm=turned), columns)
    shape = [0] * (axes - 1) + [-1]
    flat = op.Reshape(sums, constant(shape, np.int64))
    zero = constant([0], np.int64)
    kept = op.Slice(flat, zero, constant([places], np.int64), last)
    return op.Add(x, op.Cast(kept, to=x.dtype))


TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    torch.ops.aten.__lshift__.Scalar: _left_shift,
    torch.ops.aten.__rshift__.Scalar: _right_shift,
    torch.ops.aten.bitwise_left_shift.Tensor_Scalar: _left_shift,
    torch.ops.aten.bitwise_right_shift.Tensor_Scalar: _right_shift,
    torch.ops.aten.scatter_add.default: _scatter_add,
}
