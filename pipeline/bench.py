"""Compare how long artifacts take, in fresh pairs of processes; see `validate.regression`.

A stored baseline cannot be timed beside the new run, so both are timed beside a yardstick, a fixed
piece of work, and their ratios to it are compared: what the machine does to both cancels. That
holds on one machine with one NumPy; elsewhere the verdict is inconclusive and says why.
"""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vcompress.export.runtime import open_session
from vcompress.export.timing_worker import YARDSTICK
from vcompress.models.calls import Batch, Call, named_arrays
from vcompress.pipeline.golden import golden_inputs
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact, sha256_of
from vcompress.spec.errors import BuildError, InputError
from vcompress.validate.latency import describe_device
from vcompress.validate.regression import (
    LOOKS,
    NUM_QUADS,
    Estimate,
    RegressionOutcome,
    RegressionVerdict,
    decide,
    estimate,
    minus,
    verdict,
)

__all__ = ["Arm", "Benchmark", "arm_of", "bench", "graph_arm", "measure_arms", "measure_pairs"]

_CONTROL_PAIRS = 3
_CONTROL_LIMIT = math.log(1.025)
Judge = Callable[[Estimate, bool], RegressionOutcome | None]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a process times: a graph with its inputs, or the yardstick where there is none.

    `repeat` is the number of calls done for each 100 counted; a block takes three times
    `block_seconds` at least.
    """

    onnx: Path | None = None
    inputs: Path | None = None
    repeat: int = 100
    block_seconds: float = 0.05


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


def graph_arm(onnx: Path, batch: Batch | NDArray[Any], inputs: Path) -> Arm:
    """The graph at `onnx` with the first clip of `batch`, which goes to the file `inputs`."""
    session = open_session(onnx, threads=1)
    if not isinstance(batch, Call) and session.batch_is_dynamic:
        batch = batch[:1]
    arrays = named_arrays(batch, session.input_names)
    contiguous: dict[str, Any] = {
        name: np.ascontiguousarray(value) for name, value in arrays.items()
    }
    np.savez(inputs, **contiguous)
    return Arm(onnx=onnx, inputs=inputs)


def measure_arms(
    old: Arm, new: Arm, judge: Judge, progress: Progress, *, looks: tuple[int, ...] = LOOKS
) -> tuple[Estimate, RegressionOutcome]:
    """Time both arms in fresh process pairs until `judge` has an outcome.

    Args:
        judge: told the estimate and whether this look is the last, where it must decide.
    """
    quads = np.empty((0, NUM_QUADS))
    for look in looks:
        wanted = look - len(quads)
        quads = np.concatenate(
            [quads, measure_pairs(old, new, wanted, progress, "process pairs", first=len(quads))]
        )
        found = estimate(quads)
        outcome = judge(found, look == looks[-1])
        if outcome is not None:
            return found, outcome
    message = "the last look must decide"
    raise AssertionError(message)


def measure_pairs(
    old: Arm, new: Arm, count: int, progress: Progress, name: str, *, first: int = 0
) -> NDArray[np.float64]:
    """Differences of quads `[count, quads]`, a row a fresh process pair, in logarithms.

    Args:
        name: of the stage that `progress` is told of.
        first: number of the first pair; cores take turns by it.
    """
    rows = []
    with progress.stage(name, count) as advance:
        for index in range(first, first + count):
            rows.append(_pair(old, new, index))
            advance(1)
    return np.array(rows)


def _pair(old: Arm, new: Arm, index: int) -> list[float]:
    """Differences of the quads of one fresh pair, on one core, which changes with the pair."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    core = cores[index % len(cores)]
    # The size of the environment moves the stack, which is part of what a process draws; the order
    # of quads is no secret either, but must not follow a rhythm of the machine.
    padding = "x" * secrets.randbelow(4096)
    order = random.Random(secrets.randbits(32))
    workers: list[_Worker] = []
    try:
        # One starts after the other: each warms up undisturbed.
        workers += [_Worker(old, core, padding)]
        workers += [_Worker(new, core, padding)]
        differences = []
        for _ in range(NUM_QUADS):
            first = order.randrange(2)
            sums = [0.0, 0.0]
            for arm in (first, 1 - first, 1 - first, first):
                sums[arm] += math.log(workers[arm].block())
            differences.append((sums[1] - sums[0]) / 2)
        return differences
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A fresh process that times an arm."""

    def __init__(self, arm: Arm, core: int | None, padding: str) -> None:
        settings = {
            "onnx": None if arm.onnx is None else str(arm.onnx.resolve()),
            "inputs": None if arm.inputs is None else str(arm.inputs), "core": core,
            "repeat": arm.repeat, "block_seconds": arm.block_seconds,
        }  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vcompress.export.timing_worker", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **threads, "VCOMPRESS_PADDING": padding},
        )  # fmt: skip
        try:
            self._line("ready")
        except BaseException:
            self.close()
            raise

    def block(self) -> float:
        """Nanoseconds of a call, in one block."""
        assert self._process.stdin is not None, "a pipe was asked for"
        try:
            self._process.stdin.write("block\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return float(self._line("a time"))

    def _line(self, what: str) -> str:
        assert self._process.stdout is not None, "a pipe was asked for"
        line = self._process.stdout.readline().strip()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            message = f"the process that times ended before it gave {what}: {''.join(last)}"
            raise BuildError(message)
        return line

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._process.terminate()
        self._process.wait()
        self._errors.close()
