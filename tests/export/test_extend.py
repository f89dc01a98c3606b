from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from vcompress import cli
from vcompress.export.deployed import open_deployed
from vcompress.export.extend import export_runtime, require_formats
from vcompress.export.other_input import export_with_input
from vcompress.export.publish import write_manifest
from vcompress.export.readback import read_precision
from vcompress.export.serving import export_for_server
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

Exported = Callable[[str, str, str], Any]


@pytest.fixture(scope="module")
def made(
    exported: Exported, clips: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """An artifact of the tiny recogniser in a format; the original is never changed."""
    folder = tmp_path_factory.mktemp("artifacts")

    def make(format: str) -> Path:
        path = folder / format
        if path.exists():
            return path
        path.mkdir()
        portable, engine = (exported("tiny", format, name) for name in ("portable", "tensorrt"))
        shutil.copyfile(portable.path, path / "model.onnx")
        shutil.copyfile(engine.path, path / "model.tensorrt.onnx")
        _, frames, channels, height, width = clips.shape
        clip = ClipSpec(
            num_frames=frames, height=height, width=width, channels=channels,
            mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels],
        )  # fmt: skip
        pixels = np.random.default_rng(0).integers(0, 256, (2, *clips.shape[1:]), np.uint8)
        shape = (1, channels, 1, 1)
        values = pixels.astype(np.float32) * np.float32(clip.rescale)
        values -= np.array(clip.mean, np.float32).reshape(shape)
        values /= np.array(clip.std, np.float32).reshape(shape)
        outputs = portable.module(torch.from_numpy(values)).detach().numpy()
        np.savez(path / "golden.npz", inputs=values, outputs=outputs)
        (path / "labels.txt").write_text("a\nb\n")
        sizes = list(clips.shape[1:])
        manifest = {
            "schema": 1, "vcompress": "0.1.0", "created": "2026-01-01T00:00:00Z", "name": "tiny",
            "source": {}, "task": "classify", "labels": "labels.txt", "requires": {},
            "precision": {"target": format}, "clip": clip.as_dict(),
            "inputs": [{
                "name": "pixel_values", "dtype": "float32", "layout": "NTCHW",
                "shape": ["batch", *sizes],
            }],
            "outputs": [
                {"name": "output", "dtype": "float32", "shape": ["batch", *outputs.shape[1:]]}
            ],
            "golden": {
                "file": "golden.npz", "inputs": "inputs", "outputs": "outputs", "max": 0.05,
            },
        }  # fmt: skip
        roles = {
            "model.onnx": "onnx", "model.tensorrt.onnx": "tensorrt-onnx", "golden.npz": "golden",
            "labels.txt": "labels",
        }  # fmt: skip
        write_manifest(path, manifest, roles=roles)
        return path

    return make


@pytest.fixture
def artifact(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(format: str) -> Path:
        return Path(shutil.copytree(made(format), tmp_path / "out"))

    return copied


@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_a_graph_for_openvino_is_added_and_proven(
    artifact: Callable[[str], Path], format: str
) -> None:
    path = artifact(format)
    before = {entry["path"] for entry in Artifact.open(path).manifest["files"]}
    done = export_runtime(path, "openvino")
    assert done.golden_relative_l2 is not None
    assert done.golden_relative_l2 < 0.02
    assert any("i8" in kernel or "f4e2m1" in kernel for kernel in done.kernels)
    opened = Artifact.open(path, verify_hashes=True)
    after = {entry["path"] for entry in opened.manifest["files"]}
    assert after - before == {"model.openvino.onnx"}
    assert not export_runtime(path, "openvino").written
    assert open_deployed(path, runtime="openvino").check() == done.golden_relative_l2
    assert export_runtime(path, "onnxruntime").golden_relative_l2 == pytest.approx(0, abs=2e-6)


def test_a_graph_that_computes_something_else_is_refused(artifact: Callable[[str], Path]) -> None:
    """Swapped scales of two layers, which nothing but running the file can tell."""
    path = artifact("int8")
    model = onnx.load(path / "model.tensorrt.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight_scale"):
            scale = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale[::-1] * 3, tensor.name))
    onnx.save(model, path / "model.tensorrt.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    roles = {entry["path"]: entry["role"] for entry in manifest.pop("files")}
    (path / "manifest.json").unlink()
    write_manifest(path, manifest, roles=roles)
    with pytest.raises(BuildError, match="computes something else on CPU"):
        export_runtime(path, "openvino")


def test_an_engine_for_another_gpu_is_added(artifact: Callable[[str], Path]) -> None:
    path = artifact("int8")
    done = export_runtime(path, "tensorrt-rtx", sm="86")
    assert done.file == "model.sm86.engine"
    (entry,) = (each for each in Artifact.open(path).manifest["files"] if each["role"] == "engine")
    assert entry["about"]["sm"] == "86"
    assert entry["bytes"] == done.facts["num_bytes"]
    # It runs on that GPU alone, and says so where there is none.
    assert done.golden_relative_l2 is None
    sees = "engines for SM 86, and this machine has no NVIDIA GPU that TensorRT-RTX sees"
    with pytest.raises(MissingCapabilityError, match=sees):
        open_deployed(path, runtime="tensorrt-rtx")
    with pytest.raises(InputError, match="is the number of a GPU"):
        open_deployed(path, runtime="tensorrt-rtx", provider="CUDAExecutionProvider")
    with pytest.raises(InputError, match=r"has no engine of TensorRT; .*--runtime tensorrt --sm"):
        open_deployed(path, runtime="tensorrt")


def test_four_bit_weights_for_onnx_runtime_on_a_gpu(artifact: Callable[[str], Path]) -> None:
    path = artifact("int4_g32 alone")
    done = export_runtime(path, "onnxruntime-cuda")
    # Checked on the CPU, which has the kernel too.
    assert done.golden_relative_l2 is not None
    assert 0 < done.golden_relative_l2 < 5e-3
    assert done.kernels["MatMulNBits"] == done.formats["int4_g32"] > 0
    # It says so where the provider is not there.
    with pytest.raises((MissingCapabilityError, BuildError), match="CUDAExecutionProvider"):
        open_deployed(path, runtime="onnxruntime-cuda")
    shutil.rmtree(path)
    other = artifact("int8")
    with pytest.raises(MissingCapabilityError, match=r"no products of integers.*--target int4"):
        export_runtime(other, "onnxruntime-cuda")
    with pytest.raises(InputError, match="--runtime onnxruntime-cuda"):
        open_deployed(other, runtime="onnxruntime-cuda")


def test_a_gpu_without_fp4_is_offered_what_it_has(made: Callable[[str], Path]) -> None:
    graph = made("nvfp4") / "model.tensorrt.onnx"
    with pytest.raises(MissingCapabilityError, match=r"SM 89 has no FP4.*fp8.*int8.*int4 \(W4A16"):
        require_formats(graph, "89")
    with pytest.raises(MissingCapabilityError) as refused:
        require_formats(graph, "80")
    assert "--target fp8" not in str(refused.value)
    require_formats(graph, "120")
    require_formats(made("int8") / "model.tensorrt.onnx", "75")


def test_pixels_can_go_straight_into_the_graph(
    artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    path = artifact("int8")
    export_runtime(path, "openvino")
    new = tmp_path / "new"
    # Not approximately: the operators are the same, in the same order.
    assert export_with_input(path, new, dtype="uint8", layout="NCTHW").golden_relative_l2 == (
        open_deployed(path).check()
    )
    deployed = open_deployed(new, runtime="openvino")
    assert deployed.check() < 0.02
    assert (deployed.clip.dtype, deployed.clip.layout) == ("uint8", "NCTHW")
    assert deployed.artifact.manifest["inputs"][0]["dtype"] == "uint8"
    for name in ("model.onnx", "model.tensorrt.onnx", "model.openvino.onnx"):
        assert read_precision(new / name).formats == read_precision(path / name).formats
    with pytest.raises(InputError, match="take in its preprocessing"):
        export_with_input(new, tmp_path / "again", dtype="uint8")
    with pytest.raises(InputError, match="--force"):
        export_with_input(path, new, dtype="uint8")


def test_a_wrong_normalisation_is_caught(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    path = artifact("int8")
    manifest = json.loads((path / "manifest.json").read_text())
    wrong = copy.deepcopy(manifest)
    # The golden clips are no longer what pixels give by the manifest.
    wrong["clip"]["std"] = [0.05] * len(wrong["clip"]["std"])
    (path / "manifest.json").write_text(json.dumps(wrong))
    with pytest.raises(BuildError, match="not what pixels become"):
        export_with_input(path, tmp_path / "new", dtype="uint8")
    assert not (tmp_path / "new").exists()


def test_a_triton_repository(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    path = artifact("int8")
    files = export_for_server(path, tmp_path / "repository", "triton", max_batch=4)
    model = tmp_path / "repository" / "tiny_int8"
    assert {str(name) for name in files} == {
        f"tiny_int8/{name}"
        for name in ("1/model.onnx", "config.pbtxt", "labels.txt", "manifest.json")
    }
    config = model_config_pb2.ModelConfig()
    text_format.Parse((model / "config.pbtxt").read_text(), config)
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 4)
    (given,), (answered,) = config.input, config.output
    assert (given.name, given.data_type) == ("pixel_values", model_config_pb2.TYPE_FP32)
    assert list(given.dims) == Artifact.open(path).manifest["inputs"][0]["shape"][1:]
    assert (answered.label_filename, list(answered.dims)) == ("labels.txt", [5])
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert config.model_warmup[0].inputs["pixel_values"].zero_data
    onnx.checker.check_model(str(model / "1" / "model.onnx"))
    with pytest.raises(InputError, match="--force"):
        export_for_server(path, tmp_path / "repository", "triton")
    export_for_server(path, tmp_path / "repository", "triton", force=True)
    (model / "mine.txt").touch()
    with pytest.raises(InputError, match=r"mine\.txt"):
        export_for_server(path, tmp_path / "repository", "triton", force=True)


def test_a_deepstream_configuration(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    path = artifact("int8")
    export_for_server(path, tmp_path / "ds", "deepstream", max_batch=2)
    lines = (tmp_path / "ds" / "config_preprocess.txt").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    clip = open_deployed(path).clip
    shape = (2, clip.channels, clip.num_frames, clip.height, clip.width)
    assert values["network-input-shape"] == ";".join(map(str, shape))
    # A pixel through DeepStream's formula is what the manifest's gives.
    factors, offsets = (
        np.array([float(each) for each in values[key].split(";")])
        for key in ("channel-scale-factors", "channel-mean-offsets")
    )
    wanted = (200 * clip.rescale - np.array(clip.mean)) / np.array(clip.std)
    np.testing.assert_allclose((200 - offsets) * factors, wanted, rtol=1e-6)
    model = onnx.load(tmp_path / "ds" / "model.onnx", load_external_data=False)
    sizes = [each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes[1:] == list(shape[1:])
    assert (tmp_path / "ds" / "labels.txt").read_text() == "a;b\n"


def test_the_command(
    artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = artifact("int8")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vcompress", "export", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert run("--runtime", "openvino", "--json") == 0
    assert json.loads(capsys.readouterr().out)["formats"]["int8"] > 0
    assert run("--to", "triton") == 0
    assert "tritonserver --model-repository=" in capsys.readouterr().out
    assert run("--runtime", "tflite") == 2
    assert run("--runtime", "tensorrt", "--sm", "90") == 5
    assert "trtexec" in capsys.readouterr().err
    assert run("--runtime", "openvino", "--to", "triton") == 2
    assert run("--runtime", "openvino", "--sm", "89") == 2
    assert run("--to", "kubernetes") == 2
