"""Where the time of an artifact goes, beside that of the model that it was made from.

Both graphs run in ONNX Runtime, in turn, on the same input; see `export.graph_times` for the
classes. A profiler stops at every kernel, which small graphs of many kernels feel most, so both are
timed without it, too: that is how much faster the artifact is. A format that is only simulated here
gets no time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vcompress.export.graph import export_onnx
from vcompress.export.graph_times import graph_times
from vcompress.export.runtime import Session, open_session, usable_threads
from vcompress.models.calls import named_arrays
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.origin import load_origin
from vcompress.pipeline.proof import why_simulated
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.latency import (
    LatencyStatistics,
    describe_device,
    measure_interleaved,
)

__all__ = ["ProfilePair", "profile_artifact"]

_CALLS, _TURNS = 5, 3
_WARM_UP, _ROUNDS, _MIN_SECONDS = 2, 5, 1.0


@dataclass(frozen=True, kw_only=True)
class ProfilePair:
    """Seconds of one call, by class, before and after.

    Attributes:
        artifact: its folder.
        runtime: what ran both.
        threads: of the runtime.
        batch_size: of a call.
        device: of the machine.
        before, after: seconds by class of the float32 graph and of the artifact's, while watched.
        measured_before, measured_after: seconds of a call that is not watched, medians.
        speed_ratio: of calls that are not watched, before over after: median over the rounds.
    """

    artifact: str
    runtime: str
    threads: int
    batch_size: int
    device: Mapping[str, Any]
    before: Mapping[str, float]
    after: Mapping[str, float]
    measured_before: float
    measured_after: float
    speed_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": 1, "command": "profile", **asdict(self)}


def profile_artifact(
    path: Path, *, model: str | VideoModel | None = None, batch_size: int = 1,
    progress: Progress | None = None,
) -> ProfilePair:  # fmt: skip
    """Profile the portable graph of the artifact at `path` and the graph of its model.

    Args:
        path: of the artifact.
        model: what it was made from; None for what the manifest names.
        batch_size: samples of a call.
        progress: is told how far it is.

    Raises:
        InputError: no artifact, or its model is not here.
        MissingCapabilityError: the formats of its graph are only simulated here.
    """
    progress = progress or Silent()
    artifact = Artifact.open(path)
    files = {role: artifact.file(role) for role in ("plan", "onnx")}
    if files["plan"] is None or files["onnx"] is None:
        message = f"{path} has no plan or no portable graph; make the artifact again"
        raise InputError(message)
    after = open_session(files["onnx"])
    reason = why_simulated(after, CompressionPlan.load(files["plan"]))
    if reason is not None:
        message = f"{path}: no time to show, {reason}; profile the model itself"
        raise MissingCapabilityError(message)
    with progress.stage("load"):
        origin = load_origin(artifact, model)
    example = origin.example(batch_size)
    with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
        baseline = Path(folder) / "baseline.onnx"
        with progress.stage("export"):
            export_onnx(
                PrimaryOutput(origin.module, example), example, baseline, dialect="portable"
            )
        sessions = {"before": open_session(baseline), "after": after}
        with progress.stage("profile"):
            found = _in_turn(sessions, example)
            measured = _unwatched(sessions, example)
    speed = measured["after"].speed
    assert speed is not None, "it was timed beside the graph of the model"
    return ProfilePair(
        artifact=str(path), runtime=f"ONNX Runtime, {', '.join(after.providers)}",
        threads=usable_threads(), batch_size=batch_size, device=describe_device(usable_threads()),
        before=found["before"], after=found["after"],
        measured_before=measured["before"].p50_ms / 1e3,
        measured_after=measured["after"].p50_ms / 1e3, speed_ratio=speed.median,
    )  # fmt: skip


def _in_turn(sessions: Mapping[str, Session], example: Any) -> dict[str, dict[str, float]]:
    """The least disturbed profile of each."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(_TURNS):
        for name, session in sessions.items():
            times = graph_times(session, named_arrays(example, session.input_names), calls=_CALLS)
            if name not in best or sum(times.values()) < sum(best[name].values()):
                best[name] = times
    return best


def _unwatched(sessions: Mapping[str, Session], example: Any) -> dict[str, LatencyStatistics]:
    """Calls without the profiler, in turn."""
    runners = {
        name: partial(session.run_named, named_arrays(example, session.input_names))
        for name, session in sessions.items()
    }
    return measure_interleaved(runners, warm_up=_WARM_UP, rounds=_ROUNDS, min_seconds=_MIN_SECONDS)
