"""What a graph takes beyond the latency of a call: throughput in batches, and memory.

Stream mode is one clip a call, the next as soon as the last has its answer; batch mode is several
clips a call, for whoever has them waiting. Peak memory is that of a fresh process for each graph.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vcompress.export.runtime import Session
from vcompress.models.calls import Batch, named_arrays
from vcompress.spec.errors import BuildError
from vcompress.validate.latency import LatencyStatistics, measure_interleaved
from vcompress.validate.report_types import Memory, Mode

__all__ = ["BATCH_SIZE", "modes_of", "peak_memory"]

BATCH_SIZE = 8
_WARM_UP = 2
_ROUNDS = 6
_MIN_SECONDS = 0.5
_CALLS = 5


def modes_of(
    sessions: Mapping[str, Session], sample: Batch, stream: Mapping[str, LatencyStatistics]
) -> dict[str, list[Mode]]:
    """Both ways of calling, by session.

    Args:
        sessions: the graphs, by name; timed in turn.
        sample: one clip or call.
        stream: their latency with one clip a call.

    Returns:
        Batch mode is left out where a graph has a fixed batch size, and for calls.
    """
    found = {name: [_mode("stream", 1, stream[name])] for name in sessions}
    free = all(session.batch_is_dynamic for session in sessions.values())
    if not free or not isinstance(sample, torch.Tensor):
        return found
    batch = sample.expand(BATCH_SIZE, *sample.shape[1:]).contiguous()
    measured = measure_interleaved(
        {
            name: partial(session.run_named, named_arrays(batch, session.input_names))
            for name, session in sessions.items()
        },
        warm_up=_WARM_UP, rounds=_ROUNDS, min_seconds=_MIN_SECONDS,
    )  # fmt: skip
    for name, statistics in measured.items():
        found[name].append(_mode("batch", BATCH_SIZE, statistics))
    return found


def _mode(name: str, batch_size: int, found: LatencyStatistics) -> Mode:
    return Mode(
        mode=name, batch_size=batch_size, num_runs=found.num_runs, p50_ms=found.p50_ms,
        p90_ms=found.p90_ms, p99_ms=found.p99_ms,
        clips_per_second=1000 * batch_size / found.mean_ms,
    )  # fmt: skip


def peak_memory(onnx: Path, session: Session, sample: Batch) -> Memory:
    """Resident memory of a fresh process that runs the graph at `onnx` on `sample`.

    Raises:
        BuildError: the process ended early.
    """
    with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
        inputs = Path(folder) / "inputs.npz"
        arrays = {
            name: np.ascontiguousarray(array)
            for name, array in named_arrays(sample, session.input_names).items()
        }
        np.savez(inputs, allow_pickle=False, **arrays)
        worker = [sys.executable, "-m", "vcompress.export.memory_worker"]
        done = subprocess.run(
            [*worker, str(onnx.resolve()), str(inputs), str(_CALLS)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        last = "".join(done.stderr.strip().splitlines()[-1:])
        message = f"the process that measures memory ended early: {last}"
        raise BuildError(message)
    measured = json.loads(done.stdout)
    return Memory(idle_mib=measured["idle_mib"], peak_mib=measured["peak_mib"])
