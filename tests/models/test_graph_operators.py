"""Every ONNX operator of the translation against ONNX Runtime, in graphs of one or a few nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vcompress.models.graphs.onnx_file import read_onnx
from vcompress.models.graphs.onnx_module import translate
from vcompress.models.graphs.operators import OPERATORS
from vcompress.models.graphs.parity import onnx_runner, relative_error

X = (2, 4, 5, 6, 6)
# Operator, constants behind x (None: left out), attributes, and how x is made first.
Case = tuple[str, list[Any], dict[str, Any]]


def floats(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(0.1, 1.5, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


UNARY = [
    "Abs", "Neg", "Exp", "Erf", "Sin", "Cos", "Tanh", "Sigmoid", "Relu", "Floor", "Ceil", "Round",
    "Reciprocal", "Softplus", "HardSwish", "Mish", "Sign", "LeakyRelu", "Elu", "HardSigmoid",
    "Identity", "GlobalAveragePool", "Gelu",
]  # fmt: skip
POOL = {"kernel_shape": [3, 3, 2], "strides": [2, 2, 2]}
CASES: list[Case] = [
    *((name, [], {}) for name in UNARY),
    *((name, [floats(6)], {}) for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum",
                                           "Mean", "PRelu")),
    ("Pow", [np.float32(2.0)], {}), ("Mod", [floats(6)], {"fmod": 1}),
    ("Clip", [np.float32(-0.5), np.float32(0.7)], {}), ("Clip", [None, np.float32(0.1)], {}),
    ("Gelu", [], {"approximate": "tanh"}), ("Elu", [], {"alpha": 0.5}),
    ("Softmax", [], {"axis": 2}), ("LogSoftmax", [], {"axis": -1}),
    ("Flatten", [], {"axis": 2}), ("Flatten", [], {}), ("Transpose", [], {"perm": [0, 2, 1, 4, 3]}),
    ("Transpose", [], {}), ("Reshape", [ints(0, -1, 36)], {}), ("Squeeze", [], {}),
    ("Unsqueeze", [ints(1, -1)], {}), ("Expand", [ints(3, 1, 1, 1, 1, 1)], {}),
    ("Tile", [ints(1, 2, 1, 1, 3)], {}), ("Concat", [floats(2, 4, 5, 6, 2)], {"axis": -1}),
    ("Gather", [ints(2, -1)], {"axis": 1}), ("Gather", [np.int64(-1)], {"axis": 2}),
    ("Gather", [np.array([[0, 1], [1, 0]])], {"axis": 1}),
    ("GatherElements", [np.array([[[[[0, -1]]]]])], {"axis": 4}),
    ("GatherND", [np.array([[0, 1], [1, 3]])], {}),
    ("ScatterElements", [np.array([[[[[1, -1]]]]]), floats(1, 1, 1, 1, 2)], {"axis": 4}),
    ("Slice", [ints(1, -3), ints(4, 2**62), ints(2, 4)], {}),
    ("Slice", [ints(-1), ints(-(2**62)), ints(3), ints(-2)], {}),
    ("Slice", [ints(0), ints(5), ints(3), ints(2)], {}),
    ("Pad", [ints(0, 0, 1, 0, 2, 0, 0, 0, 1, 1), np.float32(3.0)], {}),
    ("Pad", [ints(1, 2), None, ints(3)], {"mode": "edge"}),
    ("Pad", [ints(1, 2, 0, 1), None, ints(3, 4)], {"mode": "reflect"}),
    *((name, [ints(2, -1)], {"keepdims": 0}) for name in (
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
        "ReduceSumSquare", "ReduceLogSumExp")),
    ("ReduceL2", [], {}), ("ReduceSum", [], {"noop_with_empty_axes": 1}),
    ("CumSum", [np.int64(2)], {"exclusive": 1, "reverse": 1}),
    ("LayerNormalization", [floats(6), floats(6)], {}),
    ("LayerNormalization", [floats(6, 6)], {"axis": -2, "epsilon": 1e-3}),
    ("BatchNormalization", [floats(4, seed=s) for s in range(4)], {}),
    ("InstanceNormalization", [floats(4), floats(4)], {}),
    ("GroupNormalization", [floats(4), floats(4)], {"num_groups": 2}),
    ("RMSNormalization", [floats(6)], {}),
    ("MaxPool", [], POOL), ("MaxPool", [], {**POOL, "pads": [1, 0, 0, 1, 1, 1]}),
    ("MaxPool", [], {**POOL, "ceil_mode": 1, "pads": [1, 1, 0, 1, 1, 0]}),
    ("MaxPool", [], {**POOL, "auto_pad": "SAME_UPPER"}),
    ("AveragePool", [], POOL), ("AveragePool", [], {**POOL, "pads": [1, 0, 0, 1, 1, 1]}),
    ("AveragePool", [], {**POOL, "pads": [1, 1, 0, 1, 1, 0], "count_include_pad": 1}),
    ("AveragePool", [], {**POOL, "ceil_mode": 1}),
    ("AveragePool", [], {**POOL, "ceil_mode": 1, "pads": [1, 1, 0, 1, 1, 0]}),
    ("AveragePool", [], {**POOL, "auto_pad": "SAME_LOWER"}),
    ("Conv", [floats(8, 4, 3, 3, 2), floats(8)], {"strides": [1, 2, 2], "pads": [1] * 6}),
    ("Conv", [floats(4, 2, 3, 3, 2)], {"group": 2, "dilations": [1, 2, 1],
                                        "pads": [0, 1, 0, 1, 0, 1]}),
    ("Conv", [floats(4, 4, 3, 3, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2, 2]}),
    ("ConvTranspose", [floats(4, 3, 2, 2, 2), floats(3)], {"strides": [2, 2, 2], "pads": [1] * 6}),
    ("MatMul", [floats(6, 3)], {}), ("MatMul", [floats(4, 5, 6, 3)], {}),
    ("Cast", [], {"to": TensorProto.INT32}), ("Einsum", [floats(6, 3)],
                                               {"equation": "abcde,ef->abcdf"}),
    ("ArgMax", [], {"axis": 4, "keepdims": 0}), ("Dropout", [], {}),
]  # fmt: skip


def saved(path: Path, nodes: list[Any], constants: dict[str, Any], *, shape: Any = X,
          opset: int = 23, outputs: tuple[str, ...] = ("y",)) -> Path:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, X)
            # A function of other operators, of which shape inference makes nothing.
            if nodes[-1].op_type == "GroupNormalization"
            else helper.make_empty_tensor_value_info(name)
            for name in outputs
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


def difference(path: Path) -> float:
    file = read_onnx(path)
    x = torch.from_numpy(floats(*X, seed=7) - 0.8)
    ours, theirs = translate(file)(x), onnx_runner(file)(x)
    assert ours.dtype == theirs.dtype
    return relative_error(ours, theirs)


@pytest.mark.parametrize(
    ("operator", "constants", "attributes"), CASES,
    ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)],
)  # fmt: skip
def test_one_operator(
    tmp_path: Path, operator: str, constants: list[Any], attributes: dict[str, Any]
) -> None:
    named = {f"c{place}": value for place, value in enumerate(constants) if value is not None}
    inputs = [
        "x", *(f"c{place}" if one is not None else "" for place, one in enumerate(constants))
    ]  # fmt: skip
    node = helper.make_node(operator, inputs, ["y"], **attributes)
    assert difference(saved(tmp_path / "m.onnx", [node], named)) < 1e-5


def test_sizes_stay_sizes_through_the_arithmetic_of_exporters(tmp_path: Path) -> None:
    """Reshape to (batch, 4 * 5, -1), as older exporters write it, and a Where over sizes."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["shape"]), make("Gather", ["shape", "zero"], ["batch"]),
        make("Gather", ["shape", "one"], ["channels"]),
        make("Gather", ["shape", "two"], ["frames"]),
        make("Mul", ["channels", "frames"], ["tokens"]),
        make("Div", ["tokens", "one"], ["tokens1"]), make("Sub", ["tokens1", "zero"], ["tokens2"]),
        make("Unsqueeze", ["batch", "axis"], ["b"]), make("Unsqueeze", ["tokens2", "axis"], ["t"]),
        make("Concat", ["b", "t", "rest"], ["target"], axis=0),
        make("Equal", ["target", "rest"], ["is_rest"]),
        make("Where", ["is_rest", "rest", "target"], ["chosen"]),
        make("Reshape", ["x", "chosen"], ["flat"]),
        make("ConstantOfShape", ["chosen1"], ["ones"],
             value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.5])),
        make("Mul", ["flat", "ones"], ["y"]),
        make("Slice", ["shape", "axis", "ends"], ["chosen2"]),
        make("ReduceProd", ["chosen2"], ["product"], keepdims=1),
        make("Squeeze", ["product"], ["scalar"]), make("Cast", ["scalar"], ["as_float"], to=1),
        make("Sqrt", ["as_float"], ["root"]), make("Div", ["y", "root"], ["z"]),
        make("Split", ["z"], ["first", "second"], axis=2, num_outputs=2),
        make("Add", ["first", "second"], ["w"]),
    ]  # fmt: skip
    nodes.insert(13, make("Concat", ["t", "wide"], ["chosen1"], axis=0))
    constants = {
        "zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "axis": ints(0),
        "rest": ints(-1), "ends": ints(1), "wide": ints(36),
    }  # fmt: skip
    path = saved(tmp_path / "m.onnx", nodes, constants, outputs=("w",))
    assert difference(path) < 1e-6


def test_logic_and_bits(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Greater", ["x", "low"], ["a"]), make("LessOrEqual", ["x", "high"], ["b"]),
        make("And", ["a", "b"], ["c"]), make("Not", ["c"], ["d"]), make("Or", ["c", "a"], ["e"]),
        make("Xor", ["d", "e"], ["f"]), make("Where", ["f", "x", "low"], ["g"]),
        make("Mul", ["x", "many"], ["h"]), make("Cast", ["h"], ["i"], to=TensorProto.UINT8),
        make("BitShift", ["i", "three"], ["j"], direction="RIGHT"),
        make("BitwiseAnd", ["j", "three"], ["k"]), make("BitwiseOr", ["k", "one"], ["l"]),
        make("BitwiseXor", ["l", "three"], ["m"]), make("Cast", ["m"], ["n"], to=1),
        make("Add", ["g", "n"], ["o"]), make("Pow", ["high", "low"], ["p"]),
        make("Cast", ["p"], ["q"], to=TensorProto.INT32),
        make("Cast", ["x"], ["r"], to=TensorProto.INT32), make("Div", ["r", "q"], ["s"]),
        make("Cast", ["s"], ["t"], to=1), make("Add", ["o", "t"], ["y"]),
    ]  # fmt: skip
    constants = {
        "low": np.float32(-0.1), "high": np.float32(0.1), "many": np.float32(0.0),
        "three": np.uint8(3), "one": np.uint8(1),
    }  # fmt: skip
    assert difference(saved(tmp_path / "m.onnx", nodes, constants)) < 1e-6


def test_every_operator_is_tested() -> None:
    here = Path(__file__).read_text()
    untested = {name for name in OPERATORS if f'"{name}"' not in here}
    # Too plain, or tested by whole models.
    assert untested <= {
        "Sqrt", "Log", "IsNaN", "GreaterOrEqual", "Less", "CastLike", "Range", "ArgMin", "TopK",
        "Swish",
    }  # fmt: skip
