"""Folders that other people's servers take: a Triton model repository, a DeepStream configuration.

Both are text made from the manifest, beside the graph. Sources: Triton's `model_config.proto` and
its page on model configuration; DeepStream's pages on Gst-nvdspreprocess and Gst-nvinfer, and its
sample of 3-D action recognition.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from vcompress.export.extend import export_with_input, graph_file
from vcompress.spec.artifact import MANIFEST, Artifact, sha256_of
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["SERVERS", "export_for_server"]

_TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8",
                 "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}  # fmt: skip
# Triton collects requests for at most so long, where a larger batch is worth it.
_QUEUE_MICROSECONDS = 2000
_LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_custom_sequence_preprocess.so"


def export_for_server(
    path: Path, output: Path, server: str, *, max_batch: int = 8, force: bool = False
) -> tuple[Path, ...]:
    """Write what `server` takes; the files, relative to `output`.

    Args:
        path: an artifact.
        output: a folder that is not there, or is empty; for Triton the model repository.
        server: one of `SERVERS`.
        max_batch: clips in one run, where the graph leaves their number free.
        force: replace a folder that is already at `output`, if it was written by this function.

    Raises:
        InputError: no artifact, an unknown server, a folder in the way, or a model that the server
            has no place for.
    """
    if server not in SERVERS:
        message = f"unknown server {server!r}; choose one of: {', '.join(SERVERS)}"
        raise InputError(message)
    artifact = Artifact.open(path, verify_hashes=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        folder = Path(name) / "made"
        folder.mkdir()
        SERVERS[server](artifact, folder, max_batch)
        made = tuple(sorted(each.relative_to(folder) for each in folder.rglob("*.*")))
        _make_room(output, made, force=force)
        folder.chmod(0o755)
        folder.rename(output)
    return made


def _make_room(output: Path, made: tuple[Path, ...], *, force: bool) -> None:
    if not output.exists():
        return
    if output.is_dir():
        there = [each.relative_to(output) for each in output.rglob("*") if each.is_file()]
        foreign = [str(each) for each in there if each not in made]
        if not there or (force and not foreign):
            shutil.rmtree(output)
            return
        if force:
            message = f"{output} holds other files: {', '.join(foreign[:3])}; move them first"
            raise InputError(message)
    message = f"{output} is there already; replace it with --force, or choose another output"
    raise InputError(message)


def _triton(artifact: Artifact, folder: Path, max_batch: int) -> None:
    manifest = artifact.manifest
    name = re.sub(r"\W+", "_", f"{manifest['name']}_{manifest['precision'].get('target', '')}")
    model = folder / name.strip("_")
    (model / "1").mkdir(parents=True)
    source = graph_file(artifact, "onnx")
    _copy_graph(source, model / "1" / "model.onnx")
    shutil.copyfile(artifact.path / MANIFEST, model / MANIFEST)
    if manifest.get("labels"):
        shutil.copyfile(artifact.path / manifest["labels"], model / "labels.txt")
    text = _config(manifest, model.name, max_batch, sha256_of(artifact.path / MANIFEST))
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


def _config(manifest: Mapping[str, Any], name: str, max_batch: int, digest: str) -> str:
    tensors = [*manifest["inputs"], *manifest["outputs"]]
    free = all(tensor["shape"][:1] == ["batch"] for tensor in tensors)
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch if free else 0}",
    ]
    for kind in ("inputs", "outputs"):
        described = []
        for tensor in manifest[kind]:
            labels = kind == "outputs" and manifest.get("labels")
            described.append(
                f"  {{\n    name: {json.dumps(tensor['name'])}\n"
                f"    data_type: {_TRITON_TYPES[tensor['dtype']]}\n"
                f"    dims: {_dims(tensor['shape'], free)}\n"
                + ('    label_filename: "labels.txt"\n' if labels else "")
                + "  }"
            )
        lines.append(f"{kind[:-1]} [\n" + ",\n".join(described) + "\n]")
    if free:
        lines.append(
            "dynamic_batching {\n"
            f"  max_queue_delay_microseconds: {_QUEUE_MICROSECONDS}\n}}"
        )  # fmt: skip
    warm = "\n".join(
        f"  inputs {{\n    key: {json.dumps(tensor['name'])}\n    value: {{ data_type: "
        f"{_TRITON_TYPES[tensor['dtype']]} dims: {_dims(tensor['shape'], free)} zero_data: true "
        "}\n  }"
        for tensor in manifest["inputs"]
    )
    lines.append(f'model_warmup [ {{\n  name: "zeros"\n  batch_size: {int(free)}\n{warm}\n}} ]')
    for key, value in (("manifest", MANIFEST), ("manifest_sha256", digest)):
        lines.append(
            f'parameters {{ key: "vcompress_{key}" value: {{ string_value: "{value}" }} }}'
        )
    return "\n".join(lines) + "\n"


def _dims(shape: list[Any], free: bool) -> str:
    sizes = shape[1:] if free else shape
    return "[ " + ", ".join(str(size) if isinstance(size, int) else "-1" for size in sizes) + " ]"


def _deepstream(artifact: Artifact, folder: Path, max_batch: int) -> None:
    manifest = artifact.manifest
    if manifest["clip"] is None or manifest["task"] != "classify":
        message = (
            f"{artifact.path} is no recogniser of clips; DeepStream's sequence preprocessing is "
            "for those alone"
        )
        raise InputError(message)
    clip = ClipSpec.from_dict(manifest["clip"])
    if clip.dtype != "float32":
        message = "DeepStream's sequence preprocessing gives floats; take the float32 artifact"
        raise InputError(message)
    if clip.layout == "NCTHW":
        _copy_graph(graph_file(artifact, "tensorrt-onnx"), folder / "model.onnx")
    else:
        # The sequence library lays clips out as channels, frames, rows, columns.
        with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
            ordered = Path(name) / "ordered"
            export_with_input(artifact.path, ordered, dtype="float32", layout="NCTHW")
            made = Artifact.open(ordered)
            _copy_graph(graph_file(made, "tensorrt-onnx"), folder / "model.onnx")
    free = manifest["inputs"][0]["shape"][0] == "batch"
    batch = max_batch if free else int(manifest["inputs"][0]["shape"][0])
    (folder / "config_preprocess.txt").write_text(_preprocess(manifest, clip, batch))
    (folder / "config_infer.txt").write_text(_infer(manifest, clip, batch))
    labels = (artifact.path / manifest["labels"]).read_text(encoding="utf-8").splitlines()
    # nvinfer reads the labels of one classifier from one line.
    (folder / "labels.txt").write_text(";".join(labels) + "\n", encoding="utf-8")
    shutil.copyfile(artifact.path / MANIFEST, folder / MANIFEST)


def _preprocess(manifest: Mapping[str, Any], clip: ClipSpec, batch: int) -> str:
    def channels(values: list[float]) -> str:
        return ";".join(f"{value:.9g}" for value in values)

    mean, std = ((list(each) * clip.channels)[: clip.channels] for each in (clip.mean, clip.std))
    sizes = (batch, clip.channels, clip.num_frames, clip.height, clip.width)
    return f"""\
# Made by vcompress from {MANIFEST}: (pixel - offset) * factor, channel by channel.
[property]
enable=1
target-unique-ids=1
network-input-order=2
network-input-shape={";".join(map(str, sizes))}
network-color-format={2 if clip.channels == 1 else 0}
tensor-data-type=0
tensor-name={manifest["inputs"][0]["name"]}
processing-width={clip.width}
processing-height={clip.height}
maintain-aspect-ratio=0
scaling-pool-memory-type=0
scaling-pool-compute-hw=0
scaling-filter=1
custom-lib-path={_LIBRARY}
custom-tensor-preparation-function=CustomSequenceTensorPreparation

[user-configs]
channel-scale-factors={channels([clip.rescale / one for one in std])}
channel-mean-offsets={channels([one / clip.rescale for one in mean])}
# New frames of each window, and frames that are left out between two of a window.
stride={clip.num_frames * clip.stride}
subsample={clip.stride - 1}

[group-0]
src-ids=0
{_geometry(clip)}
"""


def _geometry(clip: ClipSpec) -> str:
    if clip.resize == "exact":
        return "process-on-roi=0"
    return (
        "# The model knows the centre of a frame. nvdspreprocess stretches whole frames: give the\n"
        f"# centre, of the shape {clip.width} x {clip.height}, as roi-params-src-0=left;top;width;"
        "height\n# in pixels of the source, and set process-on-roi=1.\nprocess-on-roi=0"
    )


def _infer(manifest: Mapping[str, Any], clip: ClipSpec, batch: int) -> str:
    return f"""\
# Made by vcompress. TensorRT builds the engine on the device when it first starts; precision stands
# in the graph. On the element: input-tensor-meta=1, behind nvdspreprocess.
[property]
input-tensor-from-meta=1
gpu-id=0
gie-unique-id=1
process-mode=1
network-type=1
onnx-file=model.onnx
model-engine-file=model.engine
batch-size={batch}
network-mode=0
labelfile-path=labels.txt
classifier-threshold=0.0
output-blob-names={manifest["outputs"][0]["name"]}
output-tensor-meta=1
"""


def _copy_graph(source: Path, target: Path) -> None:
    """A graph under another name, with its external weights under the name that it knows."""
    shutil.copyfile(source, target)
    locations = {
        entry.value
        for tensor in onnx.load(source, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in locations:
        shutil.copyfile(source.parent / location, target.parent / location)


SERVERS: Mapping[str, Callable[[Artifact, Path, int], None]] = MappingProxyType(
    {"triton": _triton, "deepstream": _deepstream}
)
