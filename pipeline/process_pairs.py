"""Fresh pairs of processes that time two programs in turn, on one core.

The statistics of what they give are `validate.regression`'s; what a process does is
`export.timing_worker`'s.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vcompress.export.runtime import open_session
from vcompress.models.calls import Batch, Call, named_arrays
from vcompress.pipeline.run import Progress
from vcompress.spec.errors import BuildError
from vcompress.validate.regression import LOOKS, NUM_QUADS, Estimate, RegressionOutcome, estimate

__all__ = ["Arm", "Judge", "graph_arm", "measure_arms", "measure_pairs"]

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
