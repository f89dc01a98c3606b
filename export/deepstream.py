"""DeepStream: the configuration of nvdspreprocess and nvinfer, with the graph for TensorRT.

Sources: DeepStream's pages on Gst-nvdspreprocess and Gst-nvinfer, and its sample of 3-D action
recognition. All is text made from the manifest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcompress.export.artifact_files import copy_graph, graph_file
from vcompress.export.other_input import export_with_input
from vcompress.spec.artifact import MANIFEST, Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["write_configuration"]

_LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_custom_sequence_preprocess.so"


def write_configuration(artifact: Artifact, folder: Path, max_batch: int) -> None:
    """Write what DeepStream takes into `folder`.

    Raises:
        InputError: a model that DeepStream's sequence preprocessing has no place for.
    """
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
        copy_graph(graph_file(artifact, "tensorrt-onnx"), folder / "model.onnx")
    else:
        # The sequence library lays clips out as channels, frames, rows, columns.
        with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
            ordered = Path(name) / "ordered"
            export_with_input(artifact.path, ordered, dtype="float32", layout="NCTHW")
            made = Artifact.open(ordered)
            copy_graph(graph_file(made, "tensorrt-onnx"), folder / "model.onnx")
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
