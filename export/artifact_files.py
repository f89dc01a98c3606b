"""The files of an artifact: found by their role, copied into another one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

__all__ = ["GRAPH_ROLES", "copy_files", "copy_graph", "graph_file"]

GRAPH_ROLES = ("onnx", "tensorrt-onnx", "openvino-onnx")


def graph_file(artifact: Artifact, role: str) -> Path:
    """The graph with this role; an `InputError` where there is none."""
    path = artifact.file(role)
    if path is None:
        message = f"{artifact.path} has no file with the role {role}; make the artifact again"
        raise InputError(message)
    return path


def copy_graph(source: Path, target: Path) -> None:
    """A graph under another name, with its external weights under the name that it knows."""
    # Not needed, and often not there, where artifacts are only run.
    import onnx

    shutil.copyfile(source, target)
    locations = {
        entry.value
        for tensor in onnx.load(source, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in locations:
        shutil.copyfile(source.parent / location, target.parent / location)


def copy_files(
    artifact: Artifact, target: Path, *, without: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    """Copy the files of an artifact; their roles, and what is known about them."""
    roles, abouts = {}, {}
    for entry in artifact.manifest["files"]:
        name = entry["path"]
        if name in without:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, target / name)
        roles[name] = entry["role"]
        if "about" in entry:
            abouts[name] = entry["about"]
    return roles, abouts
