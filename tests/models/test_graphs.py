"""ONNX files and programs of torch.export as models: layers, blocks, parity, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vcompress import cli
from vcompress.compress.attention_sites import find_attentions
from vcompress.export.graph import export_onnx
from vcompress.export.trace import quiet
from vcompress.models.graphs import source
from vcompress.models.load import LoadOptions, load_model
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

SHAPE = (3, 4, 16, 16)
TRUSTED = LoadOptions(trust_pickle=True)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.temporal = nn.Conv3d(width, width, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.temporal(torch.relu(self.norm(self.spatial(x))))


class Convolutions(nn.Module):
    """3-D convolutions, as R3D and TransNetV2 have them, and a mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 3, 3), stride=(1, 2, 2), padding=1)
        self.stages = nn.Sequential(Residual(16), Residual(16))
        self.pool = nn.MaxPool3d((1, 2, 2), ceil_mode=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.stages(self.stem(x))).mean((2, 3, 4)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.value, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).view(x.shape[0], -1, 2, 16).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """VideoMAE in small: tubes, positions, two blocks, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.tubes = nn.Conv3d(3, 32, (2, 8, 8), (2, 8, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 9, 32))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.tubes(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def trained(cls: type[nn.Module]) -> nn.Module:
    """No two tensors alike, as after training; exporters share equal ones."""
    torch.manual_seed(0)
    module = cls().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else
                        0.1 * torch.randn_like(tensor))  # fmt: skip
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, each as a file with a free batch and one with a batch of 1."""
    path = tmp_path_factory.mktemp("graphs")
    clips, batch = torch.randn(2, *SHAPE), torch.export.Dim("batch")
    for cls in (Convolutions, Transformer):
        module, name = trained(cls), cls.__name__.lower()
        with quiet():
            free = torch.export.export(module, (clips,), dynamic_shapes=({0: batch},))
            torch.export.save(free, path / f"{name}.pt2")
            if cls is Convolutions:
                torch.export.save(torch.export.export(module, (clips[:1],)), path / f"{name}1.pt2")
            else:
                written = torch.onnx.export(free, dynamo=True, verbose=False)
                assert written is not None
                # The weights in a file of their own.
                written.save(path / f"{name}.onnx", external_data=True)
        export_onnx(module, clips[:1], path / f"{name}1.onnx", dialect="portable",
                    dynamic_batch=False)  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("cls", "suffix"),
    [
        (Convolutions, "1.onnx"), (Convolutions, ".pt2"), (Convolutions, "1.pt2"),
        (Transformer, ".onnx"), (Transformer, "1.onnx"), (Transformer, ".pt2"),
    ],
)  # fmt: skip
def test_layers_and_blocks_of_a_graph_are_those_of_its_module(
    folder: Path, cls: type[nn.Module], suffix: str
) -> None:
    path = folder / f"{cls.__name__.lower()}{suffix}"
    loaded, module = load_model(str(path), TRUSTED), trained(cls)
    expected = {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv3d)
    }
    assert {name: facts.weight_shape for name, facts in loaded.layers.items()} == expected
    list_name = "blocks" if cls is Transformer else "stages"
    assert loaded.blocks == (f"{list_name}.0", f"{list_name}.1")
    assert (loaded.clip.layout, loaded.task, loaded.name) == ("NCTHW", "classify", path.stem)
    assert loaded.clip.input_shape == SHAPE
    clips = loaded.example(3)
    torch.testing.assert_close(loaded(clips), module(clips).detach(), rtol=1e-4, atol=1e-5)
    # A block is called, and what is put in place of a layer counts.
    copy = loaded.copy()
    seen: list[Any] = []
    copy.layer(loaded.blocks[1]).register_forward_hook(lambda _m, _i, out: seen.append(out))
    copy.module.set_submodule("head", nn.Identity())
    assert copy(clips).shape[1] in (16, 32)
    assert len(seen) >= 1
    assert isinstance(seen[0], torch.Tensor)


@pytest.mark.parametrize("name", ["transformer.onnx", "transformer1.onnx", "transformer.pt2"])
def test_attention_is_found(folder: Path, name: str) -> None:
    model = load_model(str(folder / name), TRUSTED)
    assert len(find_attentions(model.module, model.example())) == 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["vcompress", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), ""


@pytest.mark.parametrize("name", ["convolutions1.onnx", "convolutions.pt2"])
def test_a_graph_goes_through_the_command_with_its_proof(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clips = np.random.default_rng(0).integers(0, 256, (6, 4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "clips.npz", clips=clips)
    code, _ = run(
        monkeypatch, "quantize", folder / name, "--target", "int8", "--calib",
        tmp_path / "clips.npz", "--output", tmp_path / "out", "--no-engine", "--min-sqnr", "15",
        "--algorithm", "max", "--trust-pickle", "--mean", "0.5", "--std", "0.25",
    )  # fmt: skip
    assert code == 0
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.manifest["precision"]["layers"].get("int8", 0) >= 5
    assert artifact.manifest["clip"]["mean"] == [0.5]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["outcome"] == "pass"


def test_inspect_tells_what_a_graph_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", folder / "transformer.onnx")[0] == 0
    printed = capsys.readouterr().out
    assert "1 conv3d, 13 linear" in printed
    assert "NCTHW float32 [batch, 3, 4, 16, 16]" in printed
    assert "blocks.1.query" in printed
    assert run(monkeypatch, "inspect", folder / "transformer.onnx", "--json")[0] == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"]["head"] == {"kind": "linear", "weight_shape": [4, 32]}


def graph_file(path: Path, *operators: str, inputs: int = 1, shape: Any = (1, *SHAPE),
               domain: str = "") -> Path:  # fmt: skip
    """`operators` one behind the other and a layer at the end."""
    nodes, last = [], "x0"
    for number, operator in enumerate(operators):
        nodes.append(helper.make_node(operator, [last], [f"v{number}"], domain=domain))
        last = f"v{number}"
    nodes.append(helper.make_node("MatMul", [last, "w"], ["y"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, shape) for n in range(inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((16, 8), np.float32), "w")],
    )  # fmt: skip
    del graph.output[0].type.tensor_type.shape.dim[:]
    graph.output[0].CopyFrom(
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:-1], 8])
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def refused(path: Path, options: LoadOptions | None = None) -> str:
    with pytest.raises(InputError) as error:
        load_model(str(path), options)
    return str(error.value)


def test_operators_that_are_not_known_are_all_named(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "m.onnx", "Fused", "Odd", "Odd", domain="com.other")
    assert "not translated: com.other.Fused x1, com.other.Odd x2" in refused(path)


def test_a_quantized_graph_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("QuantizeLinear", ["x0", "s"], ["v"])
    model = onnx.load(graph_file(tmp_path / "m.onnx", "Relu"))
    model.graph.node.insert(0, node)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    onnx.save(model, tmp_path / "m.onnx")
    assert "is quantized already (QuantizeLinear x1)" in refused(tmp_path / "m.onnx")


def test_inputs_that_are_no_clips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert "has 2 inputs (x0, x1)" in refused(graph_file(path, "Relu", inputs=2))
    assert "has 4 axes" in refused(graph_file(path, "Relu", shape=(1, 3, 16, 16)))
    assert "which axis is which" in refused(graph_file(path, "Relu", shape=(1, 8, 4, 16, 16)))
    free = graph_file(path, "Relu", shape=("b", 3, "t", 16, 16))
    assert "takes [b, 3, t, 16, 16] with free axes besides the batch" in refused(free)
    wrong = LoadOptions(input_spec="NCTHW:float32:1x3x4x8x8")
    assert "correct --input-spec" in refused(free, wrong)
    right = LoadOptions(input_spec="NCTHW:float32:1x3x6x16x16", mean=(0.5,), fps=8.0)
    clip = load_model(str(free), right).clip
    assert (clip.num_frames, clip.mean, clip.fps) == (6, (0.5,), 8.0)


def test_damaged_files_end_with_their_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("convolutions1.onnx", "convolutions.pt2"):
        path = tmp_path / name
        path.write_bytes((folder / name).read_bytes()[:3000])
        # The clips are there, so that the model alone is at fault.
        code, _ = run(
            monkeypatch, "quantize", path, "--target", "int8", "--calib", folder, "--trust-pickle"
        )
        assert code == 2
        assert "is damaged" in capsys.readouterr().err.replace("\n", " ")
    # Weights in another file, which is not there.
    path = tmp_path / "transformer.onnx"
    path.write_bytes((folder / "transformer.onnx").read_bytes())
    assert "is damaged" in refused(path)


def test_a_program_is_opened_only_where_it_is_trusted(folder: Path) -> None:
    assert "add --trust-pickle" in refused(folder / "convolutions.pt2")


def test_a_translation_that_computes_something_else_is_refused_with_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of = source.translate

    def wrong(file: Any) -> Any:
        module = file_of(file)
        with torch.no_grad():
            module.get_submodule("blocks.1.up").weight.mul_(1.001)
        return module

    monkeypatch.setattr(source, "translate", wrong)
    message = refused(folder / "transformer.onnx")
    assert "departs from the file by" in message
    assert ", first at linear_10 (" in message or ", first at linear_11 (" in message


def test_what_vcompress_wrote_into_a_file_is_read_again(tmp_path: Path) -> None:
    module, clips = trained(Convolutions), torch.randn(2, *SHAPE)
    clip = ClipSpec(num_frames=4, height=16, width=16, stride=3, layout="NCTHW").as_dict()
    facts = {"name": "mine", "task": "embed", "clip": clip, "labels": ["a", "b", "c", "d", "e"]}
    export_onnx(
        nn.Sequential(module), clips, tmp_path / "m.onnx", dialect="portable",
        metadata={"vcompress": json.dumps(facts)},
    )  # fmt: skip
    model = load_model(str(tmp_path / "m.onnx"))
    assert (model.name, model.task, model.clip.stride) == ("mine", "embed", 3)
    assert model.labels == ("a", "b", "c", "d", "e")

    written = onnx.load(tmp_path / "m.onnx")
    written.metadata_props[0].value = json.dumps({**facts, "target": "nvfp4"})
    onnx.save(written, tmp_path / "m.onnx")
    assert "the graph of an artifact for nvfp4" in refused(tmp_path / "m.onnx")
