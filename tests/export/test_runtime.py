from __future__ import annotations

import builtins
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vcompress.export import runtime
from vcompress.export.runtime import (
    INTEGER_KERNELS,
    available_providers,
    open_session,
    run_with_internal_values,
    usable_threads,
)
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

FLOAT = TensorProto.FLOAT
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    opset: int = 20,
) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "tiny",
        [value(name, FLOAT, shape) for name, shape in inputs.items()],
        [value(name, FLOAT, shape) for name, shape in outputs.items()], weights,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """y = x @ (2 I), batch dynamic."""
    weight = numpy_helper.from_array(2 * np.eye(3, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return save(tmp_path / "m.onnx", nodes, [weight], {"x": ["b", 3]}, {"y": ["b", 3]})


def quantized(path: Path, *, quantize_weight: bool) -> Path:
    """y = x @ (2 I) with input scale 0.5; the weight 2 is 4 x 0.5 where it is quantized, too."""
    weights = [
        numpy_helper.from_array(np.float32(0.5), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
    ]
    if quantize_weight:
        weights.append(numpy_helper.from_array(4 * np.eye(4, dtype=np.int8), "wq"))
        nodes.append(helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["w"]))
    else:
        weights.append(numpy_helper.from_array(2 * np.eye(4, dtype=np.float32), "w"))
    nodes.append(helper.make_node("MatMul", ["d", "w"], ["y"]))
    return save(path, nodes, weights, {"x": ["b", 4]}, {"y": ["b", 4]})


def test_runs_and_says_where(doubling: Path) -> None:
    session = open_session(doubling, threads=1)
    assert session.providers == (CPU,)
    assert session.input_shape == (None, 3)
    assert session.batch_is_dynamic
    for batch in (1, 5):
        x = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
        np.testing.assert_array_equal(session.run(x), 2 * x)


def test_a_static_batch_is_seen(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, [], {"x": [2, 3]}, {"y": [2, 3]})
    session = open_session(model)
    assert session.input_shape == (2, 3)
    assert not session.batch_is_dynamic
    with pytest.raises(
        InputError, match=r"tensor\(float\) \[2, 3\] as input x, got float32 \[1, 3\]"
    ):
        session.run(np.zeros((1, 3), np.float32))


def test_several_inputs_and_outputs_go_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "state"], ["y"]),
        helper.make_node("Sub", ["x", "state"], ["next"]),
    ]
    shapes: dict[str, list[int | str]] = {"x": [2], "state": [2]}
    model = save(tmp_path / "m.onnx", nodes, [], shapes, {"y": [2], "next": [2]})
    session = open_session(model)
    assert (session.input_names, session.output_names) == (("x", "state"), ("y", "next"))
    x, state = np.array([3, 4], np.float32), np.array([1, 1], np.float32)
    outputs = session.run_named({"x": x, "state": state})
    np.testing.assert_array_equal(outputs["y"], [4, 5])
    np.testing.assert_array_equal(outputs["next"], [2, 3])
    with pytest.raises(InputError, match="has the inputs x, state; use run_named"):
        session.run(x)
    with pytest.raises(InputError, match="needs the inputs x, state, got x"):
        session.run_named({"x": x})


def test_wrong_arrays_are_named_before_they_run(doubling: Path) -> None:
    session = open_session(doubling)
    with pytest.raises(InputError, match=r"\[\?, 3\] as input x, got float32 \[1, 4\]"):
        session.run(np.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match=r"takes tensor\(float\) .*, got float64 \[1, 3\]"):
        session.run(np.zeros((1, 3)))


def test_kernels_show_whether_integers_are_multiplied(tmp_path: Path) -> None:
    x = np.array([[1, -2, 0.5, 3]], np.float32)
    both = open_session(quantized(tmp_path / "both.onnx", quantize_weight=True))
    np.testing.assert_array_equal(both.run(x), 2 * x)
    assert both.kernels()["MatMulIntegerToFloat"] == 1
    assert INTEGER_KERNELS & both.kernels().keys()

    half = open_session(quantized(tmp_path / "half.onnx", quantize_weight=False))
    np.testing.assert_array_equal(half.run(x), 2 * x)
    assert half.kernels()["MatMul"] == 1
    assert not INTEGER_KERNELS & half.kernels().keys()
    assert {path.name for path in tmp_path.iterdir()} == {"both.onnx", "half.onnx"}


def test_kernels_inside_branches_count(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(operator, ["x"], [name])], name, [], [value(name, FLOAT, [2])]
        )
        for name, operator in (("then", "Sin"), ("else", "Cos"))
    }
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    session = open_session(save(tmp_path / "m.onnx", nodes, [], {"x": [2]}, {"y": [2]}))
    assert {"If": 1, "Sin": 1, "Cos": 1}.items() <= session.kernels().items()


def test_weights_in_a_file_beside_the_model_are_found(doubling: Path) -> None:
    model = onnx.load(doubling)
    outside = doubling.with_name("outside.onnx")
    onnx.save(model, outside, save_as_external_data=True, location="outside.data", size_threshold=0)
    session = open_session(outside)
    np.testing.assert_array_equal(session.run(np.ones((1, 3), np.float32)), [[2, 2, 2]])
    assert session.kernels() == {"MatMul": 1}


def test_internal_values_can_be_read(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m.onnx", quantize_weight=True)
    outside = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load(model), outside,
        save_as_external_data=True, location="outside.data", size_threshold=0,
    )  # fmt: skip
    x = np.array([[1, -2, 0.7, 100]], np.float32)
    for path in (model, outside):
        values = run_with_internal_values(path, {"x": x}, ["q", "d", "y"])
        # Scale 0.5: 0.7 is 1.4 steps and rounds to 1, 100 is beyond 127 steps.
        np.testing.assert_array_equal(values["q"], np.array([[2, -4, 1, 127]], np.int8))
        np.testing.assert_array_equal(values["d"], [[1, -2, 0.5, 63.5]])
        np.testing.assert_array_equal(values["y"], [[2, -4, 1, 127]])
    with pytest.raises(InputError, match="computes no value 'weights'"):
        run_with_internal_values(model, {"x": x}, ["weights"])
    with pytest.raises(InputError, match="is not a file"):
        run_with_internal_values(tmp_path / "none.onnx", {"x": x}, [])


def test_a_provider_that_is_not_installed_is_named(doubling: Path) -> None:
    assert CPU in available_providers()
    wanted = "NoSuchExecutionProvider"
    with pytest.raises(MissingCapabilityError, match=rf"has no {wanted}, it has .*{CPU}.*\[gpu\]"):
        open_session(doubling, providers=(wanted, CPU))


def test_cuda_is_used_or_refused(doubling: Path) -> None:
    if torch.cuda.is_available() and CUDA in available_providers():
        assert open_session(doubling, providers=(CUDA,)).providers[0] == CUDA
        return
    # With onnxruntime the provider is not there; with onnxruntime-gpu it is, and falls back.
    reason = r"has no CUDA.*vcompress-ai\[gpu\]|asked for CUDA.* and fell back to CPU"
    with pytest.raises((MissingCapabilityError, BuildError), match=reason):
        open_session(doubling, providers=(CUDA,))


def test_a_silent_fall_back_is_an_error() -> None:
    runtime._confirm_providers((CUDA,), [CUDA, CPU])
    runtime._confirm_providers((CUDA, CPU), [CUDA, CPU])
    for wanted in ((CUDA,), (CUDA, CPU)):
        with pytest.raises(BuildError, match=f"asked for {CUDA}.* and fell back to {CPU}"):
            runtime._confirm_providers(wanted, [CPU])


def test_models_that_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\x00noise")
    with pytest.raises(InputError, match="is not an ONNX model, or is damaged"):
        open_session(tmp_path / "noise.onnx")
    odd = [helper.make_node("Frobnicate", ["x"], ["y"], name="odd", domain="acme")]
    model = save(tmp_path / "odd.onnx", odd, [], {"x": [2]}, {"y": [2]})
    with pytest.raises(
        BuildError, match=r"odd\.onnx: .*acme:Frobnicate.*; export with the dialect"
    ):
        open_session(model)


def test_a_failure_while_running_is_named(tmp_path: Path) -> None:
    index = numpy_helper.from_array(np.array([5], np.int64), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")]
    model = save(tmp_path / "m.onnx", nodes, [index], {"x": ["n"]}, {"y": [5]})
    session = open_session(model)
    with pytest.raises(BuildError, match=r"failed to run m\.onnx: .*reshape"):
        session.run(np.zeros(4, np.float32))


def test_a_missing_library_names_the_line_that_installs_it(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> ModuleType:
        if name == "onnxruntime":
            message = "No module named 'onnxruntime'"
            raise ModuleNotFoundError(message)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingCapabilityError, match=r"pip install 'vcompress-ai\[cpu\]'"):
        open_session(doubling)


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("0", None), ("", None), ("two", None)])
def test_threads_are_those_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 5}, raising=False)
    assert usable_threads() == (expected or 2)
