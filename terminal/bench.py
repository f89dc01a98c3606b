"""What a person or a program sees of a benchmark."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcompress.pipeline.bench import Benchmark
    from vcompress.pipeline.bench_selftest import Selftest

__all__ = ["print_bench", "print_selftest"]


def print_bench(run: Benchmark, *, as_json: bool) -> None:
    """One run: the verdict, or what was recorded."""
    if as_json:
        print(json.dumps(run.as_dict(), allow_nan=False))
        return
    if run.verdict is None:
        print(
            f"recorded   {run.ratio.log_ratio:+.4f} (log of the time over the yardstick's), "
            f"standard error {100 * run.ratio.standard_error:.2f} %"
        )
    else:
        print(f"{run.verdict.outcome:<11}{run.verdict.reason}")
        print(f"baseline   {run.versus}")
    print(f"measured   {run.ratio.num_pairs} fresh process pairs, on {run.device['cpu']}")


def print_selftest(found: Selftest, *, as_json: bool) -> None:
    """How often each verdict came, by what was true."""
    if as_json:
        print(json.dumps(found.as_dict(), allow_nan=False))
        return
    print(f"{'machine':<12}{'truth':<10}{'pass':>8}{'regression':>12}{'inconclusive':>14}")
    words = ("pass", "regression", "inconclusive")
    for name, truths in found.simulated.items():
        for truth, counts in truths.items():
            cells = [counts.get(word, 0) for word in words]
            print(f"{name:<12}{truth:<10}{cells[0]:>8}{cells[1]:>12}{cells[2]:>14}")
    for truth, verdicts in found.live.items():
        cells = [sum(one.outcome == word for one in verdicts) for word in words]
        print(f"{'this one':<12}{truth:<10}{cells[0]:>8}{cells[1]:>12}{cells[2]:>14}")
    for truth, verdicts in found.live.items():
        for one in verdicts:
            print(f"live       {truth}: {one.reason}")
    print(f"{found.outcome:<11}{found.reason}")
