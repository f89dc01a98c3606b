"""Publishes a directory as a whole: readers see the old artifact, the new one, or none.

    lock -> temporary directory beside the target -> files -> manifest.json last -> fsync of all
    -> one rename (an exchange where the target is replaced) -> fsync of the parent -> unlock

What a crash can leave behind is a temporary directory with a name of ours; the next run removes
it. The order of the steps follows what Pillai et al. (OSDI 2014) found applications to get wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from vcompress.export.locking import held_lock
from vcompress.spec import strict_json
from vcompress.spec.artifact import MANIFEST, Artifact, sha256_of
from vcompress.spec.errors import InputError
from vcompress.spec.files import sync_directory, sync_file

__all__ = ["check_output", "staged_directory", "write_manifest"]

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An artifact without weights is a few kilobytes; less than this is a full disk.
_LEAST_FREE_BYTES = 16 * 2**20


def check_output(target: Path, *, force: bool = False, bytes_needed: int = 0) -> None:
    """Raise an `InputError` where `target` could not be published; takes milliseconds.

    Args:
        target: the directory to be made.
        force: whether an artifact that is there may be replaced.
        bytes_needed: estimate of what will be written.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, force=force)
    ancestor = target.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        message = f"{ancestor} is a file, so {target} cannot be made; choose another output"
        raise InputError(message)
    try:
        # Trying is the only test that holds for every user and every kind of file system.
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        message = f"cannot write to {ancestor} ({error.strerror}); choose another output"
        raise InputError(message) from error
    free = shutil.disk_usage(ancestor).free
    needed = max(bytes_needed, _LEAST_FREE_BYTES)
    if free < needed:
        message = (
            f"{ancestor} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed; "
            "free some space or choose another output"
        )
        raise InputError(message)


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory, and publish it as `target` when the block ends without error.

    The block writes the files and ends with `write_manifest`. On any exception, Ctrl-C and SIGTERM
    included, the temporary directory is removed and `target` is as it was.

    Args:
        target: the artifact's directory; its parents are made.
        force: replace an artifact that is there, in one step.

    Raises:
        InputError: `target` is in the way, another process writes it, or the disk is full.
    """
    target = Path(os.path.abspath(target))
    check_output(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with held_lock(target.with_name(f".{target.name}.lock"), what=str(target)):
        _recover(target)
        # Once more: it may have come since, by a process that held the lock.
        _check_target(target, force=force)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with _sigterm_raises():
                temporary.mkdir()
                yield temporary
                Artifact.open(temporary)
                _sync_tree(temporary)
                _publish(temporary, target)
                sync_directory(target.parent)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            message = (
                f"no space left while writing {error.filename or target} ({error.strerror}, "
                f"{_size(temporary) / 2**20:.1f} MiB were written); free some space or choose "
                "another output"
            )
            raise InputError(message) from error
        finally:
            # After a success this is the artifact that was replaced, if any.
            shutil.rmtree(temporary, ignore_errors=True)
            _recover(target)


def write_manifest(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    roles: Mapping[str, str],
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write `manifest.json`, the last file of an artifact.

    Args:
        folder: the directory with all other files.
        manifest: the manifest without its key `files`.
        roles: the role of every file, by its path relative to `folder`.
        about: more facts of single files (opset, compute capability ...), by path.
    """
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    assert found.keys() == roles.keys(), f"files {sorted(found)} but roles {sorted(roles)}"
    files: list[dict[str, Any]] = []
    for name in sorted(found):
        path = found[name]
        entry: dict[str, Any] = {"path": name, "role": roles[name]}
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        files.append({**entry, **({"about": dict(about[name])} if about and name in about else {})})
    text = strict_json.dump({**manifest, "files": files})
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def _check_target(target: Path, *, force: bool) -> None:
    """Raise where something that must not be replaced stands at `target`."""
    problem = ""
    if target.is_symlink():
        problem = "is a symbolic link; give the directory that it points to"
    elif not target.exists():
        return
    elif not target.is_dir():
        problem = "is a file; choose another output"
    elif target.is_mount():
        problem = "is a mount point and cannot be replaced; choose a folder inside it"
    elif any(target.iterdir()):
        problem = _objection_to_replacing(target, force=force)
    if problem:
        message = f"{target} {problem}"
        raise InputError(message)


def _objection_to_replacing(target: Path, *, force: bool) -> str:
    """Why a non-empty directory stays; an empty string where it may go."""
    listed: set[str] = set()
    if (target / MANIFEST).is_file():
        with contextlib.suppress(InputError, KeyError, TypeError):
            manifest = strict_json.read(target / MANIFEST)
            listed = {MANIFEST, *(entry["path"] for entry in manifest["files"])}
    if not listed:
        return "is not empty and is not an artifact of vcompress; choose another output"
    if not force:
        return "is an artifact already; replace it with --force, or choose another output"
    others = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()
    )
    foreign = [name for name in others if name not in listed]
    if foreign:
        return (
            f"holds files that are no part of the artifact: {', '.join(foreign[:3])}"
            f"{' ...' if len(foreign) > 3 else ''}; move them, or choose another output"
        )
    return ""


def _publish(temporary: Path, target: Path) -> None:
    """Make `temporary` the target; an artifact that was there ends up as `temporary`."""
    if not target.exists():
        if not _renameat2(temporary, target, _RENAME_NOREPLACE):
            temporary.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        temporary.rename(target)
    elif not _renameat2(temporary, target, _RENAME_EXCHANGE):
        # Not in one step here: _recover undoes the first rename if the second never comes.
        previous = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
        target.rename(previous)
        temporary.rename(target)


def _recover(target: Path) -> None:
    """Clear what dead processes left; under the lock, everything with our names is theirs."""
    ours = re.compile(re.escape(f".{target.name}.") + r"(?P<kind>tmp|old)-\d+-[0-9a-f]{8}")
    found = [(path, ours.fullmatch(path.name)) for path in target.parent.iterdir()]
    for path, match in found:
        if match and match["kind"] == "old" and not target.exists():
            path.rename(target)
        elif match:
            shutil.rmtree(path, ignore_errors=True)


def _renameat2(source: Path, destination: Path, flags: int) -> bool:
    """Linux's rename with flags; False where system or file system do not know it."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = (os.fsencode(source), os.fsencode(destination))
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(destination))


def _sync_tree(folder: Path) -> None:
    """Bring every file and directory to the disk, as readable as the manifest.

    Some writers make their files readable for the owner alone; an artifact is to be copied.
    """
    mode = (folder / MANIFEST).stat().st_mode
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod((path.stat().st_mode | mode) & 0o777)
            sync_file(path)
        else:
            sync_directory(path)
    sync_directory(folder)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that clean-up runs; a handler of the caller stays."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
