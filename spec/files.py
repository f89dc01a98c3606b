"""Files by their paths: looked at before the work that they hold, and written whole or not at all.

Directories are published by `export.publish`.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from vcompress.spec.errors import InputError

__all__ = [
    "check_clips", "check_file", "check_model", "replace_file", "sync_directory", "sync_file",
]  # fmt: skip


def check_file(path: Path, what: str = "--output") -> None:
    """Raise `InputError` where no file can be written to `path`, named by the flag `what`."""
    folder = path.absolute().parent
    if path.is_dir():
        problem = "is a folder"
    elif not folder.is_dir():
        problem = f"cannot be written, there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "cannot be written, permission denied"
    else:
        return
    message = f"{path} {problem}; choose another {what}"
    raise InputError(message)


def check_model(source: str) -> None:
    """Raise `InputError` where a model is to be read from a path at which there is nothing."""
    _check_there(
        source, "a .pt, .safetensors, .onnx or .pt2 file, a model directory, module:callable or "
        "reference:NAME",
    )  # fmt: skip


def check_clips(source: str | None) -> None:
    """The same for clips, or recorded calls; None is none."""
    if source is not None:
        _check_there(
            source, "a folder of videos, an .npz or a .pt file; for a denoiser, a file of calls"
        )


def _check_there(source: str, wanted: str) -> None:
    # What has a colon is looked up by its name, if it is no file.
    if ":" not in source and not Path(source).exists():
        message = f"{source}: no such file or folder; give {wanted}"
        raise InputError(message)


def replace_file(path: Path, data: bytes | str) -> None:
    """Write `data`, text as UTF-8, so that `path` is the old file or the new one, never a part.

    Raises:
        InputError: the file cannot be written; the old one is as it was.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        sync_file(temporary)
        temporary.replace(path)
        sync_directory(path.absolute().parent)
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror or error}; choose another output"
        raise InputError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Bring the content of a file to the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    if sys.platform == "win32":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
