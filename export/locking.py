"""A lock between processes that the system releases when its owner dies."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vcompress.spec.errors import InputError

__all__ = ["held_lock"]


@contextlib.contextmanager
def held_lock(path: Path, *, what: str) -> Iterator[None]:
    """Hold the lock file `path` for the block; never waits.

    Args:
        path: is made, holds the number of the owner's process, and is removed at the end.
        what: is being protected, for the message.

    Raises:
        InputError: another process, or another block of this one, holds the lock.
    """
    descriptor = _acquire(path, what)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        # Removed while it is held: who opens it from now on makes a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            locked = _try_lock(descriptor)
        except OSError as error:  # a file of another user, or a file system without locks
            message = f"cannot lock {path} ({error.strerror}); choose another output"
            raise InputError(message) from error
        if not locked:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = (
                f"process {owner} is writing {what}; wait until it has ended, or choose another "
                "output"
            )
            raise InputError(message)
        # The last owner may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte beyond the text: a locked byte cannot be read by others there.
            os.lseek(descriptor, 1024, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
