"""Work that is done ahead in a thread, so that decoding goes on while the model computes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["Ahead"]

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Ahead(Generic[T]):
    """The items of `source`, in order, at most `depth` of them taken before they are asked for.

    PyAV and NumPy release the interpreter while they decode, so one thread a video is enough. What
    `source` raises is raised here, after the items before it.
    """

    def __init__(self, source: Iterable[T], depth: int) -> None:
        self._source = source
        self._items: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        more, item = self._items.get()
        if more:
            return item  # type: ignore[return-value]
        self.close()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop the thread; items that nobody asked for are lost."""
        self._closed.set()
        # It may wait for room.
        with contextlib.suppress(queue.Empty):
            while True:
                self._items.get_nowait()
        self._thread.join()

    def _fill(self) -> None:
        try:
            for item in self._source:
                if not self._put((True, item)):
                    return
            self._put((False, None))
        except BaseException as error:  # every one of them belongs to the caller
            self._put((False, error))

    def _put(self, entry: tuple[bool, T | BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._items.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
