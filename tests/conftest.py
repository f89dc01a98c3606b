"""Keeps one copy of the package in memory, shares out the cores, and looks for a browser."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

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

# The browser that tests/browser opens reports in: VCOMPRESS_BROWSER, which must then be one, or
# whichever is installed. Without any those tests are not collected, which the end of a run says.
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_asked = os.environ.get("VCOMPRESS_BROWSER")
BROWSER = next(filter(None, map(shutil.which, (_asked,) if _asked else _BROWSERS)), None)
NO_BROWSER = (
    "no browser was found: the tests that open reports in one (tests/browser) did NOT run; install "
    f"one of {', '.join(_BROWSERS)}, or name one with VCOMPRESS_BROWSER"
)
collect_ignore = [] if BROWSER else ["browser"]


@pytest.fixture(scope="session")
def browser_path() -> str:
    assert BROWSER is not None, NO_BROWSER
    return BROWSER


def pytest_configure() -> None:
    if _asked and BROWSER is None:
        message = f"VCOMPRESS_BROWSER: there is no program {_asked}"
        raise pytest.UsageError(message)


def pytest_report_header() -> str:
    return f"browser: {BROWSER or 'none'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if BROWSER is None:
        terminalreporter.write_line(NO_BROWSER, yellow=True)
