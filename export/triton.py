"""A Triton model repository, for a model that answers every request anew or one that keeps a state.

Sources: Triton's `model_config.proto`, and its pages on model configuration and on implicit state.
A denoiser with its cache in the graph becomes a model of sequences: one generation of one guidance
branch is a sequence, and what is kept from step to step stays inside the server.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from vcompress.export.artifact_files import copy_graph, graph_file
from vcompress.spec.artifact import MANIFEST, Artifact, sha256_of

if TYPE_CHECKING:
    # It imports torch, which a machine that only serves does without.
    from vcompress.export.cached_graph import CachedFacts

__all__ = ["write_cached", "write_repository"]

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8",
          "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}  # fmt: skip
# Triton collects requests for at most so long, where a larger batch is worth it.
_QUEUE_MICROSECONDS = 2000
# A sequence without a request for so long is given up; a step of a large model takes seconds.
_IDLE_MICROSECONDS = 60_000_000
# Where Triton looks for the files that a state begins with.
_STATES = "initial_state"


def write_repository(artifact: Artifact, folder: Path, max_batch: int) -> None:
    """Write the repository into `folder`, with the artifact's own graph.

    Args:
        max_batch: samples in one run, where the graph leaves their number free.
    """
    manifest, model = artifact.manifest, _model_folder(artifact, folder)
    copy_graph(graph_file(artifact, "onnx"), model / "1" / "model.onnx")
    if manifest.get("labels"):
        shutil.copyfile(artifact.path / manifest["labels"], model / "labels.txt")
    free = all(
        tensor["shape"][:1] == ["batch"] for tensor in (*manifest["inputs"], *manifest["outputs"])
    )

    def described(tensor: Mapping[str, Any], *rest: str) -> str:
        sizes = tensor["shape"][1:] if free else tensor["shape"]
        return _tensor(tensor["name"], tensor["dtype"], sizes, *rest)

    labels = ('label_filename: "labels.txt"',) if manifest.get("labels") else ()
    parts = [
        _list("input", [described(tensor) for tensor in manifest["inputs"]]),
        _list("output", [described(tensor, *labels) for tensor in manifest["outputs"]]),
    ]
    if free:
        parts.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}")
    warm = "\n".join(
        f"  inputs {{\n    key: {json.dumps(tensor['name'])}\n    value: {{ data_type: "
        f"{_TYPES[tensor['dtype']]} "
        f"dims: {_dims(tensor['shape'][1:] if free else tensor['shape'])} zero_data: true }}\n  }}"
        for tensor in manifest["inputs"]
    )
    parts.append(f'model_warmup [ {{\n  name: "zeros"\n  batch_size: {int(free)}\n{warm}\n}} ]')
    _write_config(artifact, model, max_batch if free else 0, parts)


def write_cached(artifact: Artifact, folder: Path, cached: CachedFacts) -> None:
    """Write the repository into `folder`, with `cached`, a graph of the kind "if".

    Triton hands a state to a request of a sequence and takes the next one back; at the start of a
    sequence it is what `cached.start` says.
    """
    model = _model_folder(artifact, folder)
    copy_graph(cached.files[0], model / "1" / "model.onnx")
    graph = onnx.load(cached.files[0], load_external_data=False).graph
    (model / _STATES).mkdir()
    states = []
    for name, value in cached.start.items():
        (model / _STATES / name).write_bytes(np.ascontiguousarray(value).tobytes())
        kind, dims = _TYPES[str(value.dtype)], _dims(value.shape)
        states.append(
            f"    {{\n      input_name: {json.dumps(name)}\n"
            f"      output_name: {json.dumps(f'next.{name}')}\n"
            f"      data_type: {kind}\n      dims: {dims}\n"
            f"      initial_state {{ name: {json.dumps(name)} data_type: {kind} dims: {dims} "
            f"data_file: {json.dumps(name)} }}\n    }}"
        )
    parts = [
        _list("input", [_value(one) for one in graph.input if one.name not in cached.start]),
        _list("output", [_value(graph.output[0])]),
        f"sequence_batching {{\n  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}\n"
        "  direct { }\n  state [\n" + ",\n".join(states) + "\n  ]\n}",
    ]
    _write_config(artifact, model, 0, parts)


def _model_folder(artifact: Artifact, folder: Path) -> Path:
    """The folder of the model, with one of its first version and the manifest."""
    manifest = artifact.manifest
    name = re.sub(r"\W+", "_", f"{manifest['name']}_{manifest['precision'].get('target', '')}")
    model = folder / name.strip("_")
    (model / "1").mkdir(parents=True)
    shutil.copyfile(artifact.path / MANIFEST, model / MANIFEST)
    return model


def _write_config(artifact: Artifact, model: Path, max_batch: int, parts: list[str]) -> None:
    digest = sha256_of(artifact.path / MANIFEST)
    lines = [
        f"name: {json.dumps(model.name)}", 'backend: "onnxruntime"', f"max_batch_size: {max_batch}",
        *parts,
        *(
            f'parameters {{ key: "vcompress_{key}" value: {{ string_value: "{value}" }} }}'
            for key, value in (("manifest", MANIFEST), ("manifest_sha256", digest))
        ),
    ]  # fmt: skip
    (model / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _list(name: str, messages: Sequence[str]) -> str:
    return f"{name} [\n" + ",\n".join(messages) + "\n]"


def _value(described: onnx.ValueInfoProto) -> str:
    """An input or output of a graph of fixed sizes."""
    tensor = described.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return _tensor(described.name, dtype, [each.dim_value for each in tensor.shape.dim])


def _tensor(name: str, dtype: str, sizes: Sequence[int | str], *rest: str) -> str:
    fields = (f"name: {json.dumps(name)}", f"data_type: {_TYPES[dtype]}", f"dims: {_dims(sizes)}")
    return "  {\n" + "".join(f"    {field}\n" for field in (*fields, *rest)) + "  }"


def _dims(sizes: Sequence[int | str]) -> str:
    return "[ " + ", ".join(str(size) if isinstance(size, int) else "-1" for size in sizes) + " ]"
