from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vcompress.export import engine_worker
from vcompress.export.engine import (
    ShapeProfile,
    build_command,
    build_engine,
    library_version,
    supported_sms,
)
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

FLOAT = TensorProto.FLOAT
Shape = list[int | str]


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    *,
    x: Shape,
    y: Shape | None,
    opset: int = 20,
) -> Path:
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("x", FLOAT, x)],
        [helper.make_tensor_value_info("y", FLOAT, y)], weights,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """One linear layer, 16 -> 8, batch dynamic."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="head")]
    return save(tmp_path / "m.onnx", nodes, [weight("w", 16, 8)], x=["b", 4, 16], y=["b", 4, 8])


@pytest.fixture
def four_bit(tmp_path: Path) -> Path:
    """One linear layer with E2M1 weights, 16 per block along the contraction, all 1.0 (code 2)."""
    elements = helper.make_tensor(
        "w4", TensorProto.FLOAT4E2M1, [16, 16], bytes([0x22]) * 128, raw=True
    )
    scales = numpy_helper.from_array(np.ones((16, 1), np.float32), "scales")
    nodes = [
        helper.make_node("DequantizeLinear", ["w4", "scales"], ["w"], axis=-1, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="head"),
    ]
    return save(
        tmp_path / "f.onnx", nodes, [elements, scales], x=[1, 4, 16], y=[1, 4, 16], opset=23
    )


def test_builds_for_blackwell_without_a_gpu(
    linear: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, float]] = []
    target = linear.with_name("m.engine")
    facts = build_engine(linear, target, on_progress=lambda phase, done: seen.append((phase, done)))
    assert (facts.runtime, facts.sm) == ("tensorrt-rtx", "120")
    assert facts.version == library_version("tensorrt-rtx")
    assert facts.num_bytes == target.stat().st_size > 1000
    assert facts.seconds > 0
    assert facts.num_layers >= 1
    assert [(each.name, each.dtype, each.shape) for each in facts.inputs] == [
        ("x", "float", (-1, 4, 16))
    ]
    assert [(each.name, each.shape) for each in facts.outputs] == [("y", (-1, 4, 8))]
    assert facts.profiles == {
        "x": ShapeProfile(minimum=(1, 4, 16), optimum=(1, 4, 16), maximum=(8, 4, 16))
    }
    assert seen[-1][1] == 1.0
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert json.loads(json.dumps(facts.as_dict()))["profiles"]["x"]["maximum"] == [8, 4, 16]
    assert {path.name for path in target.parent.iterdir()} == {"m.onnx", "m.engine"}
    assert capfd.readouterr() == ("", "")


def test_engines_for_two_gpus_differ_and_a_given_profile_is_used(linear: Path) -> None:
    profile = {"x": ShapeProfile(minimum=(2, 4, 16), optimum=(2, 4, 16), maximum=(4, 4, 16))}
    first = build_engine(linear, linear.with_name("a"), sm="89", shape_profiles=profile)
    build_engine(linear, linear.with_name("b"), sm="120", shape_profiles=profile)
    assert first.profiles == profile
    assert linear.with_name("a").read_bytes() != linear.with_name("b").read_bytes()


def test_four_bits_build_for_blackwell_only(four_bit: Path) -> None:
    assert build_engine(four_bit, four_bit.with_name("e"), sm="120").profiles == {}
    with pytest.raises(BuildError, match=r"sm89, because .*fp4_e2m1; FP4 needs a Blackwell GPU"):
        build_engine(four_bit, four_bit.with_name("e2"), sm="89")
    assert not four_bit.with_name("e2").exists()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("NonZero", ["x"], ["y"], name="find_tokens"),
            r"node find_tokens \(NonZero\): .*; data-dependent shapes cannot be built",
        ),
        (
            helper.make_node(
                "ScatterElements", ["x", "index", "x"], ["y"],
                name="merge_tokens", reduction="add", axis=1,
            ),
            r"node merge_tokens \(ScatterElements\): Unsupported reduction type; .*one-hot",
        ),
        (
            helper.make_node("Frobnicate", ["x"], ["y"], name="odd", domain="acme"),
            r"node odd \(Frobnicate\): Plugin not found.*; the operator is not one of this runtime",
        ),
        (
            helper.make_node("MatMul", ["x", "narrow"], ["y"], name="blocks.0.fc1"),
            r"node blocks\.0\.fc1 \(MatMul\): .*= 16 and .*= 8 but must match; the ONNX model",
        ),
        (
            helper.make_node("TopK", ["x", "many"], ["y", "chosen"], name="keep"),
            r"keep: K exceeds the maximum value allowed \(3840\); TopK needs a constant K",
        ),
        (
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="input_q"),
            r"node input_q \(QuantizeLinear\): Non-zero zero point is not supported\. .*; quantize "
            "symmetrically",
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)  # fmt: skip
def test_a_graph_that_cannot_be_built_names_node_constraint_and_remedy(
    tmp_path: Path, node: onnx.NodeProto, message: str
) -> None:
    weights = [
        numpy_helper.from_array(np.zeros((1, 5000, 16), np.int64), "index"),
        weight("narrow", 8, 16),
        numpy_helper.from_array(np.array([4000], np.int64), "many"),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
    ]
    if node.op_type == "TopK":
        node.attribute.append(helper.make_attribute("axis", 1))
    model = save(tmp_path / "bad.onnx", [node], weights, x=[1, 5000, 16], y=None)
    with pytest.raises(BuildError, match=message) as caught:
        build_engine(model, tmp_path / "bad.engine")
    assert "/_src/" not in str(caught.value)
    assert "cudaError" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


def test_a_crash_of_the_builder_is_an_error_and_not_our_end(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = linear.with_name("worker.py")
    event = {"event": "node", "name": "blocks.3.attn", "operator": "Attention"}
    crashing.write_text(
        f"import json, os, signal\nprint({json.dumps(event)!r}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setattr(engine_worker, "__file__", str(crashing))
    with pytest.raises(BuildError, match=r"Segmentation fault.*blocks\.3\.attn \(Attention\)"):
        build_engine(linear, linear.with_name("m.engine"))
    crashing.write_text("raise SystemExit('no memory left')")
    with pytest.raises(BuildError, match=r"exit code 1.*no memory left"):
        build_engine(linear, linear.with_name("m.engine"))


def test_an_interrupt_ends_the_builder_too(linear: Path) -> None:
    def interrupt(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(linear, linear.with_name("m.engine"), on_progress=interrupt)
    assert [path.name for path in linear.parent.iterdir()] == ["m.onnx"]


def test_bad_requests_are_refused_before_the_build(linear: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e"
    with pytest.raises(InputError, match=r"unknown runtime 'trt'; choose one of: tensorrt-rtx"):
        build_engine(linear, engine, runtime="trt")
    with pytest.raises(InputError, match="is not a file"):
        build_engine(tmp_path / "none.onnx", engine)
    (tmp_path / "noise.onnx").write_bytes(b"\x00noise")
    with pytest.raises(InputError, match="is not an ONNX model"):
        build_engine(tmp_path / "noise.onnx", engine)
    sizes = ShapeProfile(minimum=(1, 4, 16), optimum=(1, 4, 16), maximum=(2, 4, 16))
    with pytest.raises(InputError, match=r"no input 'xx', it has x; did you mean 'x'\?"):
        build_engine(linear, engine, shape_profiles={"xx": sizes})
    wrong = ShapeProfile(minimum=(1, 5, 16), optimum=(1, 5, 16), maximum=(2, 5, 16))
    with pytest.raises(InputError, match=r"\(1, 5, 16\) does not fit input x \[\?, 4, 16\]"):
        build_engine(linear, engine, shape_profiles={"x": wrong})
    with pytest.raises(InputError, match="minimum <= optimum <= maximum"):
        ShapeProfile(minimum=(2, 4, 16), optimum=(1, 4, 16), maximum=(2, 4, 16))


def test_a_second_dynamic_axis_needs_a_profile(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="act")]
    model = save(tmp_path / "m.onnx", nodes, [], x=["b", "t", 16], y=["b", "t", 16])
    with pytest.raises(InputError, match=r"x \[\?, \?, 16\] is dynamic beyond its batch axis"):
        build_engine(model, tmp_path / "e")
    sizes = ShapeProfile(minimum=(1, 1, 16), optimum=(1, 8, 16), maximum=(2, 32, 16))
    assert build_engine(model, tmp_path / "e", shape_profiles={"x": sizes}).num_bytes > 0


def test_what_cannot_be_built_here_is_said_with_the_command_for_elsewhere(linear: Path) -> None:
    command = (
        "trtexec --onnx=m.onnx --saveEngine=m.engine --minShapes=x:1x4x16 --optShapes=x:1x4x16 "
        "--maxShapes=x:8x4x16"
    )
    engine = linear.with_name("m.engine")
    assert build_command(linear, engine) == command
    with pytest.raises(MissingCapabilityError) as caught:
        build_engine(linear, engine, sm="90")
    assert "not for SM 90" in str(caught.value)
    assert command in str(caught.value)


def test_supported_sms_are_those_of_the_library() -> None:
    assert {"75", "89", "120"} <= set(supported_sms())
    assert list(supported_sms()) == sorted(supported_sms(), key=int)


def test_the_worker_starts_without_the_rest_of_vcompress() -> None:
    code = (
        "import runpy, sys; "
        f"runpy.run_path({engine_worker.__file__!r}, run_name='worker'); "
        "print([name for name in ('vcompress', 'torch', 'onnx', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
