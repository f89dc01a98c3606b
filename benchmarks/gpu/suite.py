"""What the kernels are worth on a GPU: parity, products, whole models, memory, quality.

    python -m vcompress.benchmarks.gpu.suite --sections parity,gemm --output results.json
    python -m vcompress.benchmarks.gpu.suite --device cpu --tiny      # does it run at all

Models of real sizes have random weights and tell nothing about quality; the section `quality` runs
the trained transformer that ships at the same settings. What is not installed is named as absent.
Each section is meant to stay within eight minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vcompress.benchmarks.gpu.products import measure_parity, measure_products
from vcompress.benchmarks.gpu.quality import measure_quality
from vcompress.benchmarks.gpu.subjects import SUBJECTS, tiny
from vcompress.benchmarks.gpu.whole import measure_whole

SECTIONS = ("parity", "gemm", *SUBJECTS, "quality")


def run_section(name: str, device: torch.device, *, small: bool) -> dict[str, Any]:
    """What one section finds."""
    subjects = {key: tiny(each) if small else each for key, each in SUBJECTS.items()}
    if name in subjects:
        return measure_whole(subjects[name], device, small=small)
    if name == "gemm":
        return measure_products(tuple(subjects.values()), device)
    return {"parity": measure_parity, "quality": measure_quality}[name](device, small=small)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the sections that are asked for and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    wanted = chosen.sections.split(",")
    if unknown := sorted({*wanted} - {*SECTIONS}):
        parser.error(f"no section {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    device = torch.device(chosen.device)
    results: dict[str, Any] = {"command": sys.argv if arguments is None else arguments,
                               "machine": _machine(device), "sections": {}}  # fmt: skip
    with torch.inference_mode():
        for name in wanted:
            start = time.monotonic()
            found = run_section(name, device, small=chosen.tiny)
            results["sections"][name] = {"wall_seconds": time.monotonic() - start, **found}
            if chosen.output is not None:
                # After each section: a later one may not end.
                chosen.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": "cpu" if gpu is None else gpu.name, "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "memory_bytes": None if gpu is None else gpu.total_memory,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
