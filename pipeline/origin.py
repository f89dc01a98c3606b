"""The model that an artifact was made from, opened again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcompress.calib.sources import REFERENCE_PREFIX
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

__all__ = ["load_origin", "recorded_source"]


def recorded_source(file: Path, manifest: Mapping[str, Any] | None) -> str:
    """What the manifest of `file` names, where that is a file or a reference here.

    Raises:
        InputError: it names nothing that is here.
    """
    if manifest is None:
        message = f"{file}: a plan does not say where its model is; name it with --model"
        raise InputError(message)
    recorded = manifest["source"]
    source = str(recorded.get("id") or "") if isinstance(recorded, dict) else ""
    # An artifact may come from anybody: what it names is opened as a file, never imported.
    if not source or not (source.startswith(REFERENCE_PREFIX) or Path(source).exists()):
        message = (
            f"{file} was made from {source or 'a model in memory'}, which is not a file or "
            "directory here; name the model with --model"
        )
        raise InputError(message)
    return source


def load_origin(artifact: Artifact, source: str | VideoModel | None) -> VideoModel:
    """The uncompressed model of `artifact`.

    Args:
        source: as for `load_model`, or the model; None for what the manifest names.

    Raises:
        InputError: it is not here, or has other weights.
    """
    if source is None:
        source = recorded_source(artifact.path, artifact.manifest)
    model = source if isinstance(source, VideoModel) else load_model(source)
    wanted = str(artifact.manifest["source"].get("weights_sha256"))
    if model.weights_sha256 != wanted:
        message = (
            f"{model.source} has the weights {model.weights_sha256[:12]}, but {artifact.path} was "
            f"made from {wanted[:12]}; name that model with --model"
        )
        raise InputError(message)
    return model
