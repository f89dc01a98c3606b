"""Keeps one copy of the package in memory while pytest collects, and shares out the cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import vcompress

# The checkout root holds the package's `__init__.py`, so pytest imports it a second time, under
# the name of the checkout's folder. Under that name it must find the module that is there already.
sys.modules.setdefault(Path(__file__).resolve().parents[1].name, vcompress)

if not Path("/dev/nvidiactl").exists():
    # Read by Triton when it is imported: kernels run on a CPU, to be compared.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_processes = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if _processes is not None:
    # Read by torch when it is imported, and by every process that a test starts.
    threads = max(1, (os.cpu_count() or 1) // int(_processes))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
