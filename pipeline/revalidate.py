"""Run the proof of an artifact again, from the artifact: files, golden clips, test clips, the bars.

The baseline model is not needed for the artifact's own test clips: its outputs on them are in the
artifact, the clips are opened again by the recipe in the manifest, and their digest must be the
same. For a drop on other clips, and for the speed-up, the baseline is opened again, too.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.calib.calls import Samples
from vcompress.calib.sources import ClipRequest, open_clip_sets, open_clips
from vcompress.export.runtime import Session, open_session
from vcompress.models.video import VideoModel
from vcompress.pipeline.equivalence import run_session, run_torch
from vcompress.pipeline.golden import golden_inputs
from vcompress.pipeline.origin import load_origin
from vcompress.pipeline.run import Progress, Silent
from vcompress.pipeline.speedup import baseline_arm, measure_speedup
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.defaults import NUM_TEST_CLIPS
from vcompress.spec.errors import InputError
from vcompress.validate.gate import Verdict, judge
from vcompress.validate.metrics import Metrics, compare_outputs, relative_l2
from vcompress.validate.speed import SpeedVerdict, with_speed

__all__ = ["Validation", "validate"]

Array = npt.NDArray[Any]
_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was checked again.

    Attributes:
        num_files: whose sha256 were compared.
        golden_relative_l2: worst difference to the golden outputs; `golden_max` is allowed.
        metrics: on the test clips, against the baseline's outputs; on other clips without a bar
            the top-1 alone.
        verdict: of the gates.
        speed: what the verdict says of the speed-up; None without a bar for it.
    """

    path: Path
    num_files: int
    golden_relative_l2: float
    golden_max: float
    metrics: Metrics
    verdict: Verdict
    test_source: str
    speed: SpeedVerdict | None = None

    @property
    def passed(self) -> bool:
        """Whether the golden outputs are met and no bar is missed."""
        return self.golden_relative_l2 <= self.golden_max and self.verdict.outcome != "fail"

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        if self.golden_relative_l2 > self.golden_max:
            return (
                f"{self.path}: the golden outputs differ by {self.golden_relative_l2:.2e} "
                f"(relative L2), allowed {self.golden_max:.0e}: this runtime computes something "
                "else"
            )
        return f"{self.path}: {self.verdict.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": 1, "command": "validate", "artifact": str(self.path),
            "num_files": self.num_files, "golden_relative_l2": self.golden_relative_l2,
            "metrics": self.metrics, "verdict": self.verdict.as_dict(), "passed": self.passed,
            "speed": None if self.speed is None else self.speed.as_dict(),
            "test_clips": self.test_source,
        }  # fmt: skip


def validate(
    path: Path, *, data: str | None = None, max_drop: float | None = None,
    min_speedup: float | None = None, model: str | VideoModel | None = None,
    progress: Progress | None = None,
) -> Validation:  # fmt: skip
    """Check hashes, golden clips, test clips and bars of the artifact at `path`.

    Args:
        data: test clips to use instead of the recorded ones. Without `max_drop` the result's top-1
            stands alone and nothing is judged.
        max_drop: the bar for top-1; that of the artifact by default.
        min_speedup: the bar for the speed, as a multiple of the baseline's on one core.
        model: the baseline, where one is needed; by default what the manifest names.

    Raises:
        InputError: a file was changed, the test clips are not those of the report, or the baseline
            is not here.
        MissingCapabilityError: formats that this machine only simulates have no speed.
    """
    progress = progress or Silent()
    with progress.stage("hashes"):
        artifact = Artifact.open(path, verify_hashes=True)
        session = open_session(_file(artifact, "onnx"))
    origin = None
    if min_speedup is not None or (data is not None and max_drop is not None):
        with progress.stage("baseline"):
            origin = load_origin(artifact, model)
    with progress.stage("golden clips"):
        golden = np.load(_file(artifact, "golden"), allow_pickle=False)
        inputs = golden_inputs(artifact, golden)
        difference = relative_l2(golden["outputs"], run_session(session, inputs))
    clips, source = _test_clips(artifact, data)
    outputs = _outputs(session, clips, progress)
    metrics, verdict = _quality(artifact, clips, outputs, data, max_drop, origin, progress)
    speed = None
    if min_speedup is not None:
        assert origin is not None
        with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
            baseline, result = baseline_arm(artifact, origin, Path(name))
            speed = measure_speedup(baseline, result, min_speedup, progress)
    return Validation(
        path=path,
        num_files=len(artifact.manifest["files"]),
        golden_relative_l2=float(difference or 0.0),
        golden_max=float(artifact.manifest["golden"]["max"]),
        metrics=metrics,
        verdict=with_speed(verdict, speed),
        test_source=source,
        speed=speed,
    )


def _quality(
    artifact: Artifact, clips: Samples, outputs: Array, data: str | None, max_drop: float | None,
    origin: VideoModel | None, progress: Progress,
) -> tuple[Metrics, Verdict]:  # fmt: skip
    """What the outputs are worth against the baseline's, or their top-1 alone."""
    quality = artifact.manifest.get("quality", {})
    if data is None:
        baseline = np.load(_file(artifact, "proof"), allow_pickle=False)["baseline"]
        bar = quality.get("max_drop_points") if max_drop is None else max_drop
    elif max_drop is not None:
        assert origin is not None
        baseline, bar = _baseline_outputs(origin, clips, progress), max_drop
    else:
        reason = "without --max-drop the baseline is not run on these clips, so no drop can be told"
        unjudged = Verdict(outcome="not judged", reason=reason, num_clips=len(clips))
        return _top1_alone(outputs, clips, data), unjudged
    metrics = compare_outputs(
        baseline,
        outputs,
        labels=None if clips.labels is None else np.array(clips.labels),
        task=artifact.manifest["task"],
    )
    return metrics, judge(metrics, max_drop_points=bar, min_sqnr_db=quality.get("min_sqnr_db"))


def _baseline_outputs(model: VideoModel, clips: Samples, progress: Progress) -> Array:
    outputs: list[Array] = []
    with progress.stage("baseline on the test clips", len(clips)) as advance:
        for batch in clips.tensors(_BATCH_SIZE):
            outputs.append(run_torch(model, batch))
            advance(len(batch))
    return np.concatenate(outputs)


def _file(artifact: Artifact, role: str) -> Path:
    path = artifact.file(role)
    if path is None:
        message = f"{artifact.path} has no file with the role {role}; make the artifact again"
        raise InputError(message)
    return path


def _labels(artifact: Artifact) -> tuple[str, ...]:
    path = artifact.file("labels")
    return () if path is None else tuple(path.read_text(encoding="utf-8").splitlines())


def _test_clips(artifact: Artifact, data: str | None) -> tuple[Samples, str]:
    described = artifact.manifest["clip"]
    spec = None if described is None else ClipSpec.from_dict(described)
    recipe = dict(artifact.manifest.get("quality", {}).get("clips", {}))
    if "sha256" not in recipe:
        message = f"{artifact.path}: the manifest does not say which test clips were used"
        raise InputError(message)
    digest = recipe.pop("sha256")
    if data is not None:
        if spec is None:
            message = "--data takes labelled clips, and this model takes calls without labels"
            raise InputError(message)
        clips = open_clips(
            data, spec, part="test", limit=recipe["num_test_clips"] or NUM_TEST_CLIPS,
            seed=recipe["seed"], labels=_labels(artifact),
        )  # fmt: skip
        return clips, data
    sets = open_clip_sets(ClipRequest(**recipe), spec, _labels(artifact))
    if sets.test.digest != digest:
        message = (
            f"{sets.test_source}: these are not the test clips of the report (digest "
            f"{sets.test.digest[:12]}, the report has {digest[:12]}); restore them, or name "
            "labelled clips with --data"
        )
        raise InputError(message)
    return sets.test, sets.test_source


def _top1_alone(outputs: Array, clips: Samples, data: str) -> Metrics:
    if clips.labels is None:
        message = f"{data}: test clips without labels tell nothing; put them in folders by class"
        raise InputError(message)
    hits = int((outputs.argmax(-1) == np.array(clips.labels)).sum())
    return {"num_clips": len(clips), "top1_percent": 100 * hits / len(clips)}


def _outputs(session: Session, clips: Samples, progress: Progress) -> Array:
    outputs: list[Array] = []
    with progress.stage("test clips", len(clips)) as advance:
        for batch in clips.tensors(_BATCH_SIZE):
            outputs.append(run_session(session, batch))
            advance(len(batch))
    return np.concatenate(outputs)
