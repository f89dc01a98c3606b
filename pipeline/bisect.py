"""Where does an artifact's graph depart from its module? See `export.locate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcompress.export.locate import Location, locate
from vcompress.export.runtime import open_session
from vcompress.models.calls import as_batch
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.equivalence import PLANNED_TOLERANCE, run_session, run_torch
from vcompress.pipeline.golden import golden_inputs
from vcompress.pipeline.planning import apply_plan, read_plan
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec.artifact import Artifact, sha256_of
from vcompress.spec.errors import InputError
from vcompress.validate.metrics import relative_l2

__all__ = ["Bisection", "bisect"]


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was found.

    Attributes:
        path: of the artifact.
        relative_l2: of the outputs of file and planned module.
        changed: files whose hash is not that of the manifest.
        location: layer by layer.
    """

    path: Path
    relative_l2: float
    changed: tuple[str, ...]
    location: Location

    @property
    def departs(self) -> bool:
        """Whether the file computes something else, ties aside."""
        return self.location.first is not None

    @property
    def reason(self) -> str:
        """One line."""
        first = self.location.first
        if first is not None:
            return f"departs at {first}"
        if self.relative_l2 <= PLANNED_TOLERANCE:
            return f"all {self.location.num_layers} layers compute what the module computes"
        return (
            f"all {self.location.num_layers} layers compute what the module computes; the outputs "
            "differ by rounding ties"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": 1, "command": "bisect", "path": str(self.path),
            "relative_l2": self.relative_l2, "changed": list(self.changed), "reason": self.reason,
            "num_layers": self.location.num_layers,
            "departures": [
                {"layer": each.layer, "what": each.what, "detail": each.detail}
                for each in self.location.departures
            ],
        }  # fmt: skip


def bisect(
    path: Path, source: str | VideoModel, *, onnx: Path | None = None,
    load: LoadOptions | None = None, progress: Progress | None = None,
) -> Bisection:  # fmt: skip
    """Compare the portable graph of the artifact at `path` with the module that its plan describes.

    Hashes are told and not held against it: a changed file is what may be looked for.

    Args:
        source: the model that the artifact was made of, as in `pipeline.quantize`.
        onnx: another file to look at in place of the artifact's own, with the same layers.
        load: how the model is read.
        progress: is told how far it is.

    Raises:
        InputError: no artifact, or not of this model.
    """
    progress = progress or Silent()
    artifact = Artifact.open(path)
    plan_path, onnx_path = artifact.file("plan"), onnx or artifact.file("onnx")
    golden_path = artifact.file("golden")
    if plan_path is None or onnx_path is None or golden_path is None:
        message = f"{path} lacks its plan, its graph or its golden clips; make it again"
        raise InputError(message)
    with progress.stage("load"):
        model = source if isinstance(source, VideoModel) else load_model(source, load)
        planned = apply_plan(model, *read_plan(plan_path))
        inputs = as_batch(golden_inputs(artifact, np.load(golden_path, allow_pickle=False)))
    with progress.stage("compare layers"):
        module = PrimaryOutput(planned.module, inputs)
        location = locate(module, onnx_path, inputs[:1])
        difference = relative_l2(
            run_torch(planned, inputs[:1]), run_session(open_session(onnx_path), inputs[:1])
        )
    return Bisection(
        path=path,
        relative_l2=float(difference or 0.0),
        changed=_changed(artifact),
        location=location,
    )


def _changed(artifact: Artifact) -> tuple[str, ...]:
    return tuple(
        str(entry["path"])
        for entry in artifact.manifest["files"]
        if sha256_of(artifact.path / str(entry["path"])) != entry["sha256"]
    )
