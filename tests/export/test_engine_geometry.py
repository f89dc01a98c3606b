"""A four-bit engine of a model of real size builds for hardware that is not here."""

from __future__ import annotations

from pathlib import Path

from vcompress.benchmarks.engine_build import write_graph
from vcompress.export.engine import build_engine
from vcompress.export.readback import read_precision


def test_videomae_b_in_nvfp4_builds_for_blackwell(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx")
    formats = list(read_precision(graph.files[0]).formats.values())
    # Six linears in each of twelve blocks and the classifier; the patches are a convolution.
    assert (formats.count("nvfp4"), formats.count("int8")) == (12 * 6 + 1, 1)
    facts = build_engine(graph.files[0], tmp_path / "model.engine", sm="120")
    assert [value.shape for value in facts.inputs] == [(1, 16, 3, 224, 224)]
    assert [value.shape for value in facts.outputs] == [(1, 400)]
    # Four bits a weight and their scales, not the 345 MB of float32.
    assert 45e6 < (tmp_path / "model.engine").stat().st_size < 80e6
