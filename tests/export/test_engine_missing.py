"""The enterprise TensorRT cannot be installed from the registry alone: what is said without it."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from vcompress.export.engine import build_engine, library_version, supported_sms
from vcompress.spec.errors import MissingCapabilityError


@pytest.fixture
def _without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> ModuleType:
        if name in ("tensorrt", "tensorrt_rtx"):
            message = f"No module named {name!r}"
            raise ModuleNotFoundError(message)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)


@pytest.mark.usefixtures("_without_libraries")
@pytest.mark.parametrize(
    ("runtime", "line"),
    [
        ("tensorrt-rtx", "pip install tensorrt-rtx-cu13"),
        ("tensorrt", r"pip install 'vcompress-ai\[tensorrt\]'"),
    ],
)
def test_a_missing_library_names_the_line_that_installs_it(
    tmp_path: Path, runtime: str, line: str
) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "tiny",
        [value("x", TensorProto.FLOAT, [1, 4])], [value("y", TensorProto.FLOAT, [1, 4])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(MissingCapabilityError, match=rf"{line}; or build .*: trtexec --onnx"):
        build_engine(tmp_path / "m.onnx", tmp_path / "e", runtime=runtime, sm="90")
    assert library_version(runtime) is None
    assert supported_sms(runtime) == ()


def test_versions_are_those_of_what_is_installed() -> None:
    for runtime, module in (("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        installed = importlib.util.find_spec(module) is not None
        assert (library_version(runtime) is not None) == installed
