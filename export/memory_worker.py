"""A process that runs one model a few times and says what memory it took.

Run as `python -m vcompress.export.memory_worker ONNX INPUTS CALLS`; INPUTS is an .npz of the
graph's inputs. It prints a JSON object: `idle_mib`, what is resident before the model is loaded
(the interpreter and the runtime), and `peak_mib`, the most that ever was. Only a process of its own
can tell: a peak never falls. Elsewhere than on Linux both are null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from vcompress.export.runtime import available_providers, open_session

__all__ = ["main"]

_STATUS = Path("/proc/self/status")


def _resident_mib(field: str) -> float | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None


def main() -> None:
    """Load, run, print."""
    onnx, inputs, calls = sys.argv[1:]
    available_providers()
    with np.load(inputs, allow_pickle=False) as archive:
        arrays = dict(archive)
    # Not `getrusage`: its peak is that of the process that started this one, too.
    idle = _resident_mib("VmRSS")
    session = open_session(Path(onnx))
    for _ in range(int(calls)):
        session.run_named(arrays)
    print(json.dumps({"idle_mib": idle, "peak_mib": _resident_mib("VmHWM")}))


if __name__ == "__main__":
    main()
