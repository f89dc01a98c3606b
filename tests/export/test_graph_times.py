"""Which class a kernel of ONNX Runtime belongs to."""

from __future__ import annotations

import pytest

from vcompress.export.graph_times import class_of_node


@pytest.mark.parametrize(
    ("operator", "shapes", "expected"),
    [
        ("MatMul", [[1, 128, 96], [96, 384]], "linear"),
        ("MatMulIntegerToFloat", [[1, 128, 96], [96, 384], [1], [384], [1], [384]], "linear"),
        ("FusedMatMul", [[1, 4, 128, 24], [1, 4, 24, 128]], "attention"),
        ("QLinearMatMul", [[1, 4, 8, 8], [], [], [1, 4, 8, 8], [], []], "attention"),
        ("Gemm", [[1, 96], [96, 20], [20]], "linear"),
        ("Softmax", [[1, 4, 128, 128]], "attention"),
        ("QLinearConv", [[1, 3, 8, 8, 8]], "convolution"),
        ("SkipLayerNormalization", [[1, 128, 96]], "normalisation"),
        ("QuantizeLinear", [[1, 128, 96]], "rounding"),
        ("Add", [[1, 128, 96], [1, 128, 96]], "rest"),
    ],
)
def test_kernels_are_told_by_their_operands(
    operator: str, shapes: list[list[int]], expected: str
) -> None:
    assert class_of_node(operator, shapes) == expected
