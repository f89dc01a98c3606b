"""Compare how long artifacts take, in fresh pairs of processes; see `validate.regression`.

A stored baseline cannot be timed beside the new run, so both are timed beside a yardstick, a fixed
piece of work, and their ratios to it are compared: what the machine does to both cancels. That
holds on one machine with one NumPy; elsewhere the verdict is inconclusive and says why.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vcompress.export.timing_worker import YARDSTICK
from vcompress.pipeline.golden import golden_inputs
from vcompress.pipeline.process_pairs import Arm, graph_arm, measure_arms, measure_pairs
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact, sha256_of
from vcompress.spec.errors import InputError
from vcompress.validate.latency import describe_device
from vcompress.validate.regression import (
    NUM_QUADS,
    Estimate,
    RegressionOutcome,
    RegressionVerdict,
    decide,
    estimate,
    minus,
    verdict,
)

__all__ = ["Benchmark", "arm_of", "bench"]

_CONTROL_PAIRS = 3
_CONTROL_LIMIT = math.log(1.025)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One run: what was compared, with what outcome.

    Attributes:
        versus: "yardstick" (only recorded), a baseline file or an artifact.
        ratio: of the artifact's time to what it was timed beside.
        verdict: None where there was nothing to compare with.
    """

    artifact: str
    onnx_sha256: str
    versus: str
    ratio: Estimate
    verdict: RegressionVerdict | None
    device: dict[str, Any]
    numpy: str
    onnxruntime: str
    created: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which is also a baseline if the run was one beside the yardstick."""
        return {
            "schema": 1, "command": "bench", "artifact": self.artifact,
            "onnx_sha256": self.onnx_sha256, "versus": self.versus, "yardstick": YARDSTICK,
            "log_ratio": self.ratio.log_ratio, "standard_error": self.ratio.standard_error,
            "num_pairs": self.ratio.num_pairs, "num_quads": NUM_QUADS,
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "device": self.device, "numpy": self.numpy, "onnxruntime": self.onnxruntime,
            "created": self.created,
        }  # fmt: skip


def bench(
    path: Path, *, baseline: Path | None = None, progress: Progress | None = None
) -> Benchmark:
    """Time the artifact at `path`, and compare it with a baseline.

    Args:
        baseline: the JSON of an earlier run, or another artifact, which is timed in the same run.

    Raises:
        InputError: no artifact, formats that are only simulated, or no baseline.
        BuildError: a process that times ended early.
    """
    progress = progress or Silent()
    stored = None
    if baseline is not None and not baseline.is_dir():
        stored = _read_baseline(baseline)
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        new = arm_of(path, Path(name) / "new.npz")
        old = Arm()
        if baseline is not None and stored is None:
            old = arm_of(baseline, Path(name) / "old.npz")
        previous = None if stored is None else Estimate(**stored["ratio"])

        def judge(found: Estimate, last: bool) -> RegressionOutcome | None:
            if baseline is None:
                # A baseline is worth its full length.
                return "pass" if last else None
            return decide(found if previous is None else minus(found, previous), last=last)

        found, outcome = measure_arms(old, new, judge, progress)
        judged = None
        if baseline is not None:
            compared = found if previous is None else minus(found, previous)
            judged = verdict(compared, outcome)
            if outcome == "regression":
                judged = _controlled(judged, old if stored is None else new, progress)
        assert new.onnx is not None, "an artifact has a graph"
        result = Benchmark(
            artifact=str(path), onnx_sha256=sha256_of(new.onnx),
            versus="yardstick" if baseline is None else str(baseline), ratio=found, verdict=judged,
            device=describe_device(1), numpy=np.__version__, onnxruntime=_runtime_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
    return result if stored is None else _comparable(result, stored)


def _runtime_version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except ImportError:
            continue
    return "unknown"


def _read_baseline(path: Path) -> dict[str, Any]:
    if not path.exists():
        message = f"{path}: no such file; record a baseline with vcompress bench --output"
        raise InputError(message)
    if not path.is_file():
        message = f"{path} is neither the JSON of a run of vcompress bench nor an artifact"
        raise InputError(message)
    data = strict_json.read(path)
    keys = ("log_ratio", "standard_error", "num_pairs")
    if not isinstance(data, dict) or data.get("command") != "bench" or data.get("schema") != 1:
        message = f"{path} was not written by vcompress bench --output; record a baseline"
        raise InputError(message)
    if data.get("versus") != "yardstick" or not all(
        isinstance(data.get(key), int | float) for key in keys
    ):
        message = (
            f"{path} holds a comparison with {data.get('versus')!r}; a baseline is recorded by "
            "vcompress bench OUT --output main.json, without --baseline"
        )
        raise InputError(message)
    return {**data, "ratio": {key: data[key] for key in keys}}


def _comparable(result: Benchmark, stored: dict[str, Any]) -> Benchmark:
    """The result; inconclusive where the baseline is of another machine or yardstick."""
    here = {"CPU": result.device["cpu"], "NumPy": result.numpy, "yardstick": YARDSTICK}
    there = {
        "CPU": (stored.get("device") or {}).get("cpu"), "NumPy": stored.get("numpy"),
        "yardstick": stored.get("yardstick"),
    }  # fmt: skip
    differ = [f"{key} {there[key]}, here {here[key]}" for key in here if here[key] != there[key]]
    if not differ or result.verdict is None:
        return result
    reason = (
        f"The baseline is of another machine ({'; '.join(differ)}): its times say nothing about "
        "this one. Record it here, or name the other artifact as the baseline."
    )
    return replace(result, verdict=replace(result.verdict, outcome="inconclusive", reason=reason))


def _controlled(found: RegressionVerdict, arm: Arm, progress: Progress) -> RegressionVerdict:
    """The regression, unless the machine sees one in a program against itself, too."""
    control = estimate(measure_pairs(arm, arm, _CONTROL_PAIRS, progress, "control"))
    if abs(control.log_ratio) <= _CONTROL_LIMIT:
        return found
    reason = (
        f"{found.reason} But the same program against itself differs by {control.percent:+.1f} %, "
        "so nothing can be told."
    )
    return replace(found, outcome="inconclusive", reason=reason)


def arm_of(path: Path, inputs: Path) -> Arm:
    """The graph of an artifact and its first golden clip, which goes to the file `inputs`.

    Raises:
        InputError: no artifact, or its formats are only simulated here and so have no latency.
    """
    artifact = Artifact.open(path)
    onnx, golden, report_path = (artifact.file(role) for role in ("onnx", "golden", "report"))
    if onnx is None or golden is None or report_path is None:
        message = f"{path} has no graph, golden clips or report; make the artifact again"
        raise InputError(message)
    report = strict_json.read(report_path)
    for stage in report["stages"]:
        if stage["name"] == report["result_stage"] and stage["latency"] is None:
            message = f"{path}: {stage['latency_reason']}; there is no latency to compare"
            raise InputError(message)
    with np.load(golden, allow_pickle=False) as archive:
        batch = golden_inputs(artifact, archive)
    return graph_arm(onnx, batch, inputs)
