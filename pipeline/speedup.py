"""How many times as fast as its baseline an artifact is here, against a bar.

Both graphs are timed as `vcompress bench` does it: fresh process pairs on one core, interleaved.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from vcompress.export.graph import export_onnx
from vcompress.models.calls import Batch
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.bench import arm_of
from vcompress.pipeline.process_pairs import Arm, graph_arm, measure_arms
from vcompress.pipeline.run import Progress
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.validate.regression import LOOKS, Estimate, RegressionOutcome
from vcompress.validate.speed import SpeedOutcome, SpeedVerdict, decide_speed, speed_verdict

__all__ = ["baseline_arm", "check_speed_bar", "measure_speedup", "time_graphs"]


def check_speed_bar(min_speedup: float | None, simulated: str | None) -> None:
    """Raise where a speed-up is asked for that this machine cannot show.

    Args:
        min_speedup: the bar.
        simulated: why the artifact has no latency, if so.

    Raises:
        MissingCapabilityError: the formats are only simulated here.
    """
    if min_speedup is not None and simulated is not None:
        message = f"--min-speedup {min_speedup:g} cannot be shown on this machine: {simulated}"
        raise MissingCapabilityError(message)


def baseline_arm(artifact: Artifact, model: VideoModel, folder: Path) -> tuple[Arm, Arm]:
    """Baseline and result on the first golden clip; what they need is written to `folder`.

    Raises:
        MissingCapabilityError: the artifact's formats are only simulated here.
        BuildError: the baseline cannot be exported.
    """
    try:
        result = arm_of(artifact.path, folder / "clip.npz")
    except InputError as error:
        raise MissingCapabilityError(str(error)) from error
    example = model.example()
    graph = folder / "baseline.onnx"
    export_onnx(
        PrimaryOutput(model.module, example), example, graph, dialect="portable",
        input_name=str(artifact.manifest["inputs"][0]["name"]),
        output_name=str(artifact.manifest["outputs"][0]["name"]),
    )  # fmt: skip
    return Arm(onnx=graph, inputs=result.inputs), result


def time_graphs(
    baseline: Path, result: Path, sample: Batch, bar: float, progress: Progress, folder: Path, *,
    looks: tuple[int, ...] = LOOKS, block_seconds: float | None = None,
) -> SpeedVerdict:  # fmt: skip
    """How many times as fast the graph `result` is on `sample`; see `measure_speedup`.

    Args:
        folder: what the processes read is written here.
        block_seconds: see `Arm`.
    """

    def arm(graph: Path) -> Arm:
        made = graph_arm(graph, sample, folder / f"{graph.stem}.npz")
        return made if block_seconds is None else replace(made, block_seconds=block_seconds)

    return measure_speedup(arm(baseline), arm(result), bar, progress, looks=looks)


def measure_speedup(
    baseline: Arm, result: Arm, bar: float, progress: Progress, *, looks: tuple[int, ...] = LOOKS
) -> SpeedVerdict:
    """Time both until the bar is met or missed, after the last of `looks` pairs at the latest.

    Raises:
        InputError: a bar that is not positive.
        BuildError: a process that times ended early.
    """
    outcomes: list[SpeedOutcome] = []

    def enough(found: Estimate, last: bool) -> RegressionOutcome | None:
        outcome = decide_speed(found, bar, last=last)
        if outcome is None:
            return None
        outcomes.append(outcome)
        # Only that it has ended matters to who asks.
        return "pass"

    if not 0 < bar < math.inf:
        message = f"--min-speedup must be a positive number such as 1.5, got {bar}"
        raise InputError(message)
    found, _ = measure_arms(baseline, result, enough, progress, looks=looks)
    return speed_verdict(found, outcomes[-1], bar)
