"""A process that times one model, a block of calls whenever it is told to.

Run as `python -m vcompress.export.timing_worker SETTINGS`, where SETTINGS is a JSON object: `onnx`
and `inputs` (an .npz of the graph's inputs), or neither for the yardstick; `core` to run on, or
null; `repeat`, calls done for every 100 that are counted, which is how a slow-down is injected;
`block_seconds`, the least that each of the three repeats of a block takes.
It says `ready` once it is warm, and answers each line with the nanoseconds of a call.

The yardstick is plain NumPy (products of matrices, and exponentials that fill the cache), so that
it changes with the machine and not with the runtime that is tested.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vcompress.export.runtime import open_session

__all__ = ["YARDSTICK", "main"]

YARDSTICK = "matrices 256, exponentials 65536, version 1"
_REPEATS = 3
_WARM_SECONDS = 2.0
_STEADY = 1.1


def _yardstick() -> Callable[[], object]:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))

    def run() -> object:
        product = left @ right
        return np.exp(-np.abs(product)) @ right

    return run


def _model(settings: dict[str, Any]) -> Callable[[], object]:
    session = open_session(Path(settings["onnx"]), threads=1)
    with np.load(settings["inputs"], allow_pickle=False) as archive:
        inputs = dict(archive)
    return lambda: session.run_named(inputs)


def _timed(run: Callable[[], object], calls: int) -> int:
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return time.perf_counter_ns() - start


def _warm_up(run: Callable[[], object]) -> float:
    """Seconds of a call, once three in a row are alike or the time for it is spent."""
    spent: list[float] = []
    while len(spent) < 3 or (
        sum(spent) < _WARM_SECONDS and max(spent[-3:]) > _STEADY * min(spent[-3:])
    ):
        spent.append(_timed(run, 1) / 1e9)
    return min(spent[-3:])


def main() -> None:
    """Time blocks until standard input ends."""
    settings = json.loads(sys.argv[1])
    if settings["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {settings["core"]})
    run = _model(settings) if settings["onnx"] else _yardstick()
    calls = max(1, math.ceil(settings["block_seconds"] / max(_warm_up(run), 1e-7)))
    done = calls
    if settings["repeat"] != 100:
        # So many calls that the extra ones are whole ones.
        step = 100 // math.gcd(100, settings["repeat"])
        calls = step * math.ceil(calls / step)
        done = calls * settings["repeat"] // 100
    gc.disable()
    print("ready", flush=True)
    for _ in sys.stdin:
        gc.collect()
        print(statistics.median(_timed(run, done) for _ in range(_REPEATS)) / calls, flush=True)


if __name__ == "__main__":
    main()
