"""An artifact that takes other inputs: pixels as they are, or another order of the axes.

Nothing is decided anew and no model is needed: the artifact's own graphs get the normalisation in
front, and the golden clips are run through them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vcompress.calib.preprocess import to_frames, to_model_input
from vcompress.export.artifact_files import GRAPH_ROLES, copy_files
from vcompress.export.deployed import open_deployed
from vcompress.export.extend import Extension
from vcompress.export.fold_input import fold_input, folded_clip
from vcompress.export.manifest import GOLDEN_INPUTS
from vcompress.export.publish import staged_directory, write_manifest
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec, Layout
from vcompress.spec.errors import BuildError, InputError

__all__ = ["export_with_input"]


def export_with_input(
    path: Path, output: Path, *, dtype: str, layout: Layout | None = None, force: bool = False
) -> Extension:
    """Write the artifact anew as one that takes other inputs.

    Args:
        path: an artifact.
        output: the new one. Engines are not in it, since they have the old input.
        dtype: "uint8" moves the normalisation into the graph; "float32" leaves it out.
        layout: order of the axes; None for the one that it is.
        force: replace an artifact that is already at `output`.

    Raises:
        InputError: no artifact of clips, or one that takes bytes already.
        BuildError: the golden clips do not go with the normalisation, or the new graph computes
            something else.
    """
    artifact = Artifact.open(path, verify_hashes=True)
    if artifact.manifest["clip"] is None:
        message = f"{path} is a model of calls, not of videos: it has no preprocessing"
        raise InputError(message)
    old = ClipSpec.from_dict(artifact.manifest["clip"])
    new = folded_clip(old, dtype=dtype, layout=layout or old.layout)
    engine_files = tuple(
        entry["path"] for entry in artifact.manifest["files"] if entry["role"] == "engine"
    )
    with staged_directory(output, force=force) as staging:
        roles, abouts = copy_files(artifact, staging, without=engine_files)
        for name, role in roles.items():
            if role in GRAPH_ROLES:
                model = onnx.load(staging / name, load_external_data=False)
                fold_input(model, old, dtype=dtype, layout=new.layout)
                _describe(model, new)
                onnx.save(model, staging / name)
        _golden(staging, artifact.manifest["golden"]["file"], old, new)
        manifest = {key: value for key, value in artifact.manifest.items() if key != "files"}
        write_manifest(staging, _changed(manifest, old, new), roles=roles, about=abouts)
        error = open_deployed(staging).check()
    return Extension(
        path=output, file="model.onnx", written=True, runtime="onnxruntime", kernels={},
        golden_relative_l2=error, formats={}, facts={"clip": new.as_dict()},
    )  # fmt: skip


def _changed(manifest: dict[str, Any], old: ClipSpec, new: ClipSpec) -> dict[str, Any]:
    (described,) = manifest["inputs"]
    sizes = dict(zip(old.layout, described["shape"], strict=True))
    shape = [sizes[axis] for axis in new.layout]
    changed = {**described, "dtype": new.dtype, "layout": new.layout, "shape": shape}
    return {**manifest, "inputs": [changed], "clip": new.as_dict()}


def _describe(model: onnx.ModelProto, clip: ClipSpec) -> None:
    """Put the new clip into the metadata, for a runtime that has this file alone."""
    for entry in model.metadata_props:
        if entry.key == "vcompress":
            facts = strict_json.parse(entry.value, "metadata_props")
            entry.value = strict_json.dump({**facts, "clip": clip.as_dict()})


def _golden(folder: Path, name: str, old: ClipSpec, new: ClipSpec) -> None:
    """The golden clips as the new input takes them; the outputs stay what they were."""
    with np.load(folder / name, allow_pickle=False) as arrays:
        inputs, outputs = arrays[GOLDEN_INPUTS], arrays["outputs"]
    if new.dtype == "uint8":
        frames = [to_frames(clip, old) for clip in inputs]
        again = np.stack([to_model_input(clip, old) for clip in frames])
        if not np.allclose(again, inputs, rtol=1e-4, atol=1e-5):
            message = (
                "the golden clips are not what pixels become by the manifest's rescale, mean and "
                "std, so one of them is wrong; make the artifact again from videos, with the "
                "model's own --mean and --std"
            )
            raise BuildError(message)
        inputs = np.stack([to_model_input(clip, new) for clip in frames])
    else:
        order = [old.layout.index(axis) for axis in new.layout]
        inputs = np.ascontiguousarray(inputs.transpose(order))
    np.savez_compressed(folder / name, **{GOLDEN_INPUTS: inputs, "outputs": outputs})
