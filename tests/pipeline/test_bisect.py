"""From an artifact and its model to the layer that departs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import vcompress
from vcompress import cli
from vcompress.models.load import load_model

MODEL = "reference:penvideo20"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bisect") / "out"
    options = vcompress.Options(
        target="int8", calib=MODEL, output=path, engine=False, num_clips=8, num_test_clips=8,
        algorithm="max",
    )  # fmt: skip
    return Path(vcompress.quantize(MODEL, options=options).path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["vcompress", "bisect", *map(str, arguments), "--quiet"])
    code, message = cli._run()
    return code, message or ""


def test_a_right_artifact_departs_nowhere(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, artifact, MODEL, "--json") == (0, "")
    found = json.loads(capsys.readouterr().out)
    assert found["departures"] == []
    assert found["changed"] == []
    assert found["num_layers"] == len(load_model(MODEL).layers)


def test_a_changed_file_is_told_and_the_layer_found(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    graph = onnx.load(artifact / "model.onnx")
    layer = next(name for name in load_model(MODEL).layers if name.endswith("1.output.dense"))
    (scale,) = [t for t in graph.graph.initializer if t.name.endswith(f"{layer}.weight_scale")]
    reversed_scale = np.ascontiguousarray(numpy_helper.to_array(scale)[::-1])
    scale.CopyFrom(numpy_helper.from_array(reversed_scale, scale.name))
    onnx.save(graph, tmp_path / "broken.onnx")
    code, message = run(monkeypatch, artifact, MODEL, "--onnx", tmp_path / "broken.onnx")
    assert code == 3
    assert "departs at" in message
    assert f"{layer}: its weight dequantizes to something else" in message
    assert layer in capsys.readouterr().out
