"""The artifact: a directory whose `manifest.json` names every file with its size and sha256.

This module reads it with the standard library alone; it is the contract with edge scripts. The
manifest is written last, so a directory without a valid one is not an artifact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError

__all__ = ["MANIFEST", "SCHEMA", "Artifact", "sha256_of"]

MANIFEST = "manifest.json"
SCHEMA = 1
_REQUIRED = (
    "schema", "vcompress", "created", "name", "source", "task", "inputs", "outputs", "clip",
    "precision", "files", "requires",
)  # fmt: skip
_OPTIONAL = ("labels", "golden", "quality", "performance", "notes", "call")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its directory and its manifest, as plain data."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path, *, verify_hashes: bool = False) -> Artifact:
        """Read and check the manifest; sizes are always compared, hashes on request.

        Raises:
            InputError: no artifact, a file that is missing or was changed, or a name that leaves
                the directory.
        """
        if not (path / MANIFEST).is_file():
            message = (
                f"{path} is not an artifact: it has no {MANIFEST}; make one with vcompress quantize"
            )
            raise InputError(message)
        data = strict_json.read(path / MANIFEST)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else None
            message = f"{path / MANIFEST}: schema must be {SCHEMA}, got {got!r}"
            raise InputError(message)
        strict_json.check_keys(
            data, required=_REQUIRED, optional=_OPTIONAL, where=str(path / MANIFEST)
        )
        if not isinstance(data["files"], list):
            message = f"{path / MANIFEST}: files must be a list, got {type(data['files']).__name__}"
            raise InputError(message)
        artifact = cls(path, data)
        for entry in data["files"]:
            artifact._check_file(entry, verify_hashes=verify_hashes)
        return artifact

    def file(self, role: str) -> Path | None:
        """The file with this role ("onnx", "engine", "plan", "report" ...), or None."""
        for entry in self.manifest["files"]:
            if entry["role"] == role:
                return self.path / str(entry["path"])
        return None

    def _check_file(self, entry: Any, *, verify_hashes: bool) -> None:
        where = f"{self.path / MANIFEST}: files"
        strict_json.check_keys(
            entry, required=("path", "role", "bytes", "sha256"), optional=("about",), where=where
        )
        if not isinstance(entry["path"], str):
            message = f"{where}: path must be a string, got {entry['path']!r}"
            raise InputError(message)
        relative = PurePosixPath(entry["path"])
        if relative.is_absolute() or ".." in relative.parts or "\0" in entry["path"]:
            message = f"{where}: {entry['path']!r} leaves the artifact"
            raise InputError(message)
        path = self.path / relative
        if not path.is_file() or path.is_symlink():
            message = f"{path} is missing; the artifact is incomplete, make it again"
            raise InputError(message)
        if path.stat().st_size != entry["bytes"] or (
            verify_hashes and sha256_of(path) != entry["sha256"]
        ):
            message = f"{path} is not the file that the manifest describes; make the artifact again"
            raise InputError(message)
