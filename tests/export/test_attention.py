"""Attention in eight bits, exported: the graph computes what torch does, and engines take it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.attention_sites import apply_attention, find_attentions
from vcompress.export.engine import build_engine
from vcompress.export.graph import export_onnx
from vcompress.export.readback import read_precision
from vcompress.export.runtime import open_session
from vcompress.export.ties import count_ties
from vcompress.spec.attention_section import AttentionChoice

# Two correct kernels differ by less, and by more only where a value lies between two codes.
TOLERANCE = 1e-5


class Products(nn.Module):
    """Two attentions in a row over `[B, 3, H, N, D]`; the second with a mask."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        ranges = {"query_amax": 4.0, "key_amax": 3.5, "value_amax": 4.5}
        self.first, self.second = (
            AttentionProducts(
                AttentionChoice(format=name, reason="", smooth_keys=name != "int8", **ranges)
            )
            for name in (first, second)
        )
        self.register_buffer("allowed", torch.ones(12, 12, dtype=torch.bool).tril())

    def forward(self, operands: torch.Tensor) -> torch.Tensor:
        query, key, value = operands.unbind(1)
        mixed = self.first(query, key, value)
        return self.second(mixed, key, value, self.allowed)


def inputs(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 2, 12, 16, generator=torch.Generator().manual_seed(seed))


def check_parity(module: nn.Module, path: Path, x: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = module(x).numpy()
    output = open_session(path).run(x.numpy())
    error = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
    if error > TOLERANCE:
        explanation = count_ties(module, path, x).explanation()
        assert explanation is not None, f"relative L2 difference {error:.2e}"


@pytest.fixture(scope="module")
def module() -> Products:
    return Products("fp8", "int8").eval()


@pytest.fixture(scope="module")
def files(module: Products, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The module by dialect."""
    folder = tmp_path_factory.mktemp("attention")
    made = {}
    for dialect in ("portable", "tensorrt"):
        facts = export_onnx(module, inputs(), folder / f"{dialect}.onnx", dialect=dialect)
        assert facts.input_shape[0] == "batch"
        assert not facts.own_operators
        made[dialect] = facts.files[0]
    return made


@pytest.mark.parametrize("dialect", ["portable", "tensorrt"])
def test_a_graph_computes_what_torch_does(
    module: Products, files: dict[str, Path], dialect: str
) -> None:
    for seed, batch in ((1, 1), (2, 3)):
        check_parity(module, files[dialect], inputs(batch, seed))
    found = [each.format for each in read_precision(files[dialect]).products]
    assert found == ["fp8", "fp8", "int8", "int8"]


def test_ties_are_counted_in_the_operands_of_attention(
    module: Products, files: dict[str, Path]
) -> None:
    path = files["portable"]
    ties = count_ties(module, path, inputs(2, seed=3))
    assert ties.num_values == 2 * 2 * 2 * (3 * 12 * 16 + 12 * 12)
    assert ties.num_unexplained == 0
    assert ties.forced_relative_l2 < TOLERANCE
    # A scale that is wrong in the file is no tie.
    wrong = copy.deepcopy(module)
    wrong.second.value_scale *= 1.01
    assert count_ties(wrong, path, inputs(2, seed=3)).num_unexplained > 0


def test_values_may_be_kept_while_scores_are_rounded(tmp_path: Path) -> None:
    module = Products("int8_keep", "int8").eval()
    path = export_onnx(module, inputs(), tmp_path / "m.onnx", dialect="portable").files[0]
    check_parity(module, path, inputs(2, seed=1))
    found = [each.format for each in read_precision(path).products]
    assert found == ["int8", "float", "int8", "int8"]
    ties = count_ties(module, path, inputs(2, seed=1))
    assert ties.num_values == 2 * 2 * (2 * 2 * 12 * 16 + 12 * 16 + 12 * 12)
    assert ties.num_unexplained == 0
    # The probabilities stand in a Softmax, which runtimes fuse with both products.
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Softmax") == 1


@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_attention_of_transformers_reaches_the_file(
    name: str, original: object, clips: torch.Tensor, tmp_path: Path
) -> None:
    module = copy.deepcopy(original(name))  # type: ignore[operator]
    # One block of the two is enough.
    blocks = next(each for each in module.modules() if isinstance(each, nn.ModuleList))
    del blocks[1]
    (name_of_attention,) = find_attentions(module, clips)
    line = AttentionChoice(
        format="int8", reason="", query_amax=3.0, key_amax=3.0, value_amax=3.0, smooth_keys=True
    )
    apply_attention(module, {name_of_attention: line})
    path = export_onnx(module, clips[:1], tmp_path / "m.onnx", dialect="portable").files[0]
    check_parity(module, path, clips[1:])
    found = [each.format for each in read_precision(path).products]
    assert found == ["int8", "int8"]
    assert open_session(path).kernels()["MatMulIntegerToFloat"] == 2


def test_tensorrt_builds_an_engine_of_them(files: dict[str, Path], tmp_path: Path) -> None:
    graph = onnx.load(files["tensorrt"]).graph
    zero_points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.data_type for tensor in graph.initializer if tensor.name in zero_points}
    assert types == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN}
    facts = build_engine(files["tensorrt"], tmp_path / "products.engine", sm="120")
    assert facts.num_bytes > 0
