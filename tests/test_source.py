"""Style, types and the import contract of the whole source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command: tuple[str, ...]) -> None:
    run(sys.executable, "-m", "ruff", *command, ".")


def test_mypy() -> None:
    link = ROOT / ".cache" / "typing" / "vcompress"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT, target_is_directory=True)
    run(sys.executable, "-m", "mypy")


def test_import_contracts() -> None:
    run(shutil.which("lint-imports", path=str(BIN)) or "lint-imports", "--no-cache")
