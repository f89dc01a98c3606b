"""A buffer of fixed size that holds the newest rows of a sequence without end."""

from __future__ import annotations

import torch

from vcompress.spec.errors import InputError

__all__ = ["Ring"]


class Ring:
    """The newest `size` rows that were pushed; memory is taken at the first push and never again.

    Args:
        size: rows, at least one.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            message = f"a ring must hold at least one row, got {size}"
            raise InputError(message)
        self._size, self._next, self._count = size, 0, 0
        self._rows = self._ordered = torch.empty(0)

    @property
    def full(self) -> bool:
        """Whether `size` rows have been pushed since the beginning."""
        return self._count == self._size

    def push(self, rows: torch.Tensor) -> None:
        """Append rows `[n, ...]`, n up to `size`; as many of the oldest are overwritten.

        Raises:
            InputError: too many rows, or rows of another shape or type than those before.
        """
        if self._count == 0:
            self._rows = rows.new_empty((self._size, *rows.shape[1:]))
            self._ordered = torch.empty_like(self._rows)
        expected = (tuple(self._rows.shape[1:]), self._rows.dtype)
        if len(rows) > self._size or (tuple(rows.shape[1:]), rows.dtype) != expected:
            message = (
                f"a ring of {self._size} rows takes at most as many of {expected}, got "
                f"{len(rows)} of {(tuple(rows.shape[1:]), rows.dtype)}"
            )
            raise InputError(message)
        head = min(len(rows), self._size - self._next)
        self._rows[self._next : self._next + head] = rows[:head]
        self._rows[: len(rows) - head] = rows[head:]
        self._next = (self._next + len(rows)) % self._size
        self._count = min(self._size, self._count + len(rows))

    def ordered(self) -> torch.Tensor:
        """All rows, the oldest first, `[size, ...]`: a buffer that the next call overwrites."""
        assert self.full, "a ring is read when it is full"
        tail = self._size - self._next
        self._ordered[:tail] = self._rows[self._next :]
        self._ordered[tail:] = self._rows[: self._next]
        return self._ordered
