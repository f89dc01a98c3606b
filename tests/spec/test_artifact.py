"""The artifact directory as edge scripts read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError


def make(folder: Path, **changes: Any) -> Path:
    content = b"weights"
    (folder / "model.onnx").write_bytes(content)
    entry = {
        "path": "model.onnx", "role": "onnx", "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    manifest: dict[str, Any] = {
        "schema": 1, "vcompress": "0", "created": "", "name": "m", "source": {}, "task": "generic",
        "inputs": [], "outputs": [], "clip": {}, "precision": {}, "requires": {},
        "files": [{**entry, **changes.pop("entry", {})}], **changes,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_files_are_found_by_role(tmp_path: Path) -> None:
    artifact = Artifact.open(make(tmp_path), verify_hashes=True)
    assert artifact.file("onnx") == tmp_path / "model.onnx"
    assert artifact.file("engine") is None


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"weightz")
    Artifact.open(tmp_path)  # same size: only the hash can tell
    with pytest.raises(InputError, match="not the file that the manifest describes"):
        Artifact.open(tmp_path, verify_hashes=True)
    (tmp_path / "model.onnx").write_bytes(b"weight")
    with pytest.raises(InputError, match="not the file that the manifest describes"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a/../../b", "model\0.onnx"])
def test_a_name_never_leaves_the_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="leaves the artifact"):
        Artifact.open(make(tmp_path, entry={"path": path}))


def test_a_directory_without_manifest_and_a_future_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        Artifact.open(tmp_path)
    with pytest.raises(InputError, match="schema must be 1, got 7"):
        Artifact.open(make(tmp_path, schema=7))


def test_it_reads_with_the_standard_library_alone(tmp_path: Path) -> None:
    import subprocess
    import sys

    make(tmp_path)
    code = (
        "import sys; from vcompress.spec.artifact import Artifact; from pathlib import Path;"
        f"Artifact.open(Path({str(tmp_path)!r}), verify_hashes=True);"
        "assert not {'torch', 'numpy', 'onnx', 'click'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
