"""How long a call takes, measured side by side.

What: the runners are called in turn, A B B A and then B A A B, so that a slow drift of the
machine (heat, neighbours) hits all of them alike; running all of A and then all of B is the usual
error, whatever the statistics afterwards. Speed is compared per round: the ratio of the geometric
means of the two calls of each runner, in which a drift that is linear in time cancels. Its
interval is the percentile bootstrap of the median over rounds (Efron, 1979), seeded.
Only what really executes in its format may be handed in: a simulated format has no latency.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vcompress.spec.errors import InputError

__all__ = ["LatencyStatistics", "SpeedRatio", "describe_device", "measure_interleaved"]

_SEED = 0
_RESAMPLES = 2000
# With fewer values not even their whole range covers the median with 95 %: 1 - 2 * 0.5^n.
_MIN_ROUNDS_FOR_INTERVAL = 6


@dataclass(frozen=True, kw_only=True)
class SpeedRatio:
    """How many times as fast as another runner; below 1 is slower.

    Attributes:
        versus: the runner compared with.
        median: over the rounds.
        lower: end of the 95 % interval of the median; None below six rounds.
        upper: the other end.
        num_rounds: rounds that were paired.
    """

    versus: str
    median: float
    lower: float | None
    upper: float | None
    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class LatencyStatistics:
    """Wall-clock time of one call, in milliseconds, over `num_runs` calls after warm-up.

    `p90_ms` is None below 10 calls and `p99_ms` below 100: a quantile that no call stands for is
    not reported. `iqr_ms` is the spread between the quartiles. `speed` is None for the first
    runner, which the others are compared with.
    """

    num_runs: int
    num_warm_up: int
    mean_ms: float
    min_ms: float
    p25_ms: float
    p50_ms: float
    p75_ms: float
    p90_ms: float | None
    p99_ms: float | None
    speed: SpeedRatio | None

    @property
    def iqr_ms(self) -> float:
        """Spread between the quartiles."""
        return self.p75_ms - self.p25_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        names = ("mean_ms", "min_ms", "p25_ms", "p50_ms", "p75_ms", "p90_ms", "p99_ms", "iqr_ms")
        return {
            "num_runs": self.num_runs,
            "num_warm_up": self.num_warm_up,
            **{name: getattr(self, name) for name in names},
            "speed": None
            if self.speed is None
            else {
                "versus": self.speed.versus,
                "speed_ratio": self.speed.median,
                "speed_ratio_lower": self.speed.lower,
                "speed_ratio_upper": self.speed.upper,
                "num_rounds": self.speed.num_rounds,
            },
        }


def measure_interleaved(
    runners: Mapping[str, Callable[[], object]],
    *,
    warm_up: int,
    rounds: int,
    min_seconds: float = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, LatencyStatistics]:
    """Time the runners in turn; each is called twice a round.

    Args:
        runners: what to call, by name; the others are compared with the first. A call must end
            only when its work is done (a GPU must be synchronised).
        warm_up: untimed calls of each runner, at least one.
        rounds: rounds at least, two timed calls of each runner in every one.
        min_seconds: go on until the timed calls add up to this, however many rounds that takes.
        clock: monotonic time in nanoseconds.

    Returns:
        The statistics of each runner, in the order of `runners`.

    Raises:
        InputError: no runners, no warm-up, no rounds, or a call that is too short for the clock.
    """
    if not runners or warm_up < 1 or rounds < 1:
        message = (
            "timing needs at least one runner, one warm-up call and one round, got "
            f"{len(runners)}, {warm_up} and {rounds}"
        )
        raise InputError(message)
    names = list(runners)
    for _ in range(warm_up):
        for name in names:
            runners[name]()
    samples: dict[str, list[int]] = {name: [] for name in names}
    total, done = 0, 0
    while done < rounds or total < min_seconds * 1e9:
        order = names if done % 2 == 0 else names[::-1]
        for name in [*order, *order[::-1]]:
            elapsed = _time(name, runners[name], clock)
            samples[name].append(elapsed)
            total += elapsed
        done += 1
    times_ms = {name: np.array(values, dtype=np.float64) / 1e6 for name, values in samples.items()}
    return {
        name: _statistics(
            times_ms[name], warm_up, None if name == names[0] else (names[0], times_ms[names[0]])
        )
        for name in names
    }


def _time(name: str, runner: Callable[[], object], clock: Callable[[], int]) -> int:
    start = clock()
    result = runner()
    elapsed = clock() - start
    # Freeing the result is not part of the call.
    del result
    if elapsed <= 0:
        message = (
            f"a timed call must take longer than a tick of the clock; {name} took {elapsed} ns; "
            "let one call do more work"
        )
        raise InputError(message)
    return elapsed


def _statistics(
    times_ms: NDArray[np.float64],
    warm_up: int,
    versus: tuple[str, NDArray[np.float64]] | None,
) -> LatencyStatistics:
    quantiles = np.quantile(times_ms, (0.25, 0.5, 0.75, 0.9, 0.99))
    p25, p50, p75, p90, p99 = (float(value) for value in quantiles)
    return LatencyStatistics(
        num_runs=len(times_ms),
        num_warm_up=warm_up,
        mean_ms=float(times_ms.mean()),
        min_ms=float(times_ms.min()),
        p25_ms=p25,
        p50_ms=p50,
        p75_ms=p75,
        p90_ms=p90 if len(times_ms) >= 10 else None,
        p99_ms=p99 if len(times_ms) >= 100 else None,
        speed=None if versus is None else _speed(versus[0], versus[1], times_ms),
    )


def _speed(
    versus: str, reference_ms: NDArray[np.float64], times_ms: NDArray[np.float64]
) -> SpeedRatio:
    # Two calls a round stand beside each other: [2 * rounds] -> [rounds].
    ratios = (np.log(reference_ms) - np.log(times_ms)).reshape(-1, 2).mean(axis=1)
    lower = upper = None
    if len(ratios) >= _MIN_ROUNDS_FOR_INTERVAL:
        rng = np.random.default_rng(_SEED)
        medians = [
            float(np.median(rng.choice(ratios, size=len(ratios)))) for _ in range(_RESAMPLES)
        ]
        lower, upper = (math.exp(value) for value in np.quantile(medians, (0.025, 0.975)))
    return SpeedRatio(
        versus=versus,
        median=math.exp(float(np.median(ratios))),
        lower=lower,
        upper=upper,
        num_rounds=len(ratios),
    )


def describe_device(threads: int) -> dict[str, Any]:
    """The machine that a latency belongs to, as far as the standard library can tell.

    Args:
        threads: threads that the runners were told to use.

    Returns:
        `cpu`, `num_cores`, `num_usable_cores`, `num_threads`, `load_average_1min` and
        `memory_mib` (None where the system does not say), `platform`, `python`; `clock_mhz`, the
        mean clock of the cores now, and `gpu`, name, clocks and driver by nvidia-smi, if any.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "clock_mhz": _clock_mhz(),
        "gpu": _gpu(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": os.cpu_count() if affinity is None else len(affinity(0)),
        "num_threads": threads,
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_mib": _memory_mib(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    description = Path("/proc/cpuinfo")
    if description.is_file():
        for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "hardware", "model") and value.strip():
                if value.strip().isdecimal():
                    continue
                return value.strip()
    elif platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return platform.processor() or platform.machine()


def _clock_mhz() -> int | None:
    current = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    try:
        clocks = [int(path.read_text()) / 1000 for path in current]
        if not clocks:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return round(sum(clocks) / len(clocks)) if clocks else None


def _gpu() -> str | None:
    query = "--query-gpu=name,clocks.sm,clocks.mem,memory.total,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, ValueError, OSError):
        return None
