"""Repeating the last answer while a stream does not change: for models that cannot be cut.

What: a joint model sees all frames of a window at once, and nothing of it can be kept exactly. But
a camera often shows the same. Every frame is averaged down to 16 x 16 cells; a window is compared
with the one that the last answer was computed from, frame by frame and cell by cell, and where a
signal stays under a threshold the answer is repeated instead of computed. At the latest when no
frame is left of the window that it was computed from, it is computed anew.

Signal and threshold are found, not asked for: over whole videos everything is computed, then every
signal is replayed at every threshold, and the one that repeats most is taken of those that hold the
bar with 95 % confidence (Wilson, 1927), or that never disagree where there are too few windows for
that. On other videos the bar itself must hold, and what is measured there is what is told.

Shapes: T frames, C channels, h w = 16 x 16 cells, W windows of a video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from vcompress.spec.errors import InputError

__all__ = ["SIGNALS", "Gate", "Replay", "Watched", "find_gate", "replay", "thumbnails"]

_CELLS = 16
_NUM_THRESHOLDS = 64
_AT_ONCE = 64
_Z95 = 1.6449

Signal = Callable[[torch.Tensor], torch.Tensor]


def _mean(change: torch.Tensor) -> torch.Tensor:
    """Of all cells of all frames."""
    return change.abs().mean(dim=(-4, -3, -2, -1))


def _cell(change: torch.Tensor) -> torch.Tensor:
    """Of the cell that changed most over all frames: something small that moves counts."""
    return change.abs().mean(dim=(-4, -3)).amax(dim=(-2, -1))


def _frame(change: torch.Tensor) -> torch.Tensor:
    """Of the frame that changed most: something short counts."""
    return change.abs().mean(dim=(-3, -2, -1)).amax(dim=-1)


def _scene(change: torch.Tensor) -> torch.Tensor:
    """Of the picture that the frames add up to: what moves to and fro does not count."""
    return change.mean(dim=-4).abs().mean(dim=(-3, -2, -1))


# Change `[..., T, C, h, w]`, as a share of full brightness, to one number each.
SIGNALS: Mapping[str, Signal] = MappingProxyType(
    {"mean": _mean, "cell": _cell, "frame": _frame, "scene": _scene}
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """When an answer is repeated.

    Attributes:
        signal: in `SIGNALS`.
        threshold: repeated while the signal is at most this.
        max_repeats: in a row.
    """

    signal: str
    threshold: float
    max_repeats: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a full run over one video left behind.

    Attributes:
        thumbnails: of each window, `[W, T, C, h, w]`.
        labels: the top class of each window.
    """

    thumbnails: torch.Tensor
    labels: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How a gate did, by counting.

    Attributes:
        num_windows: in all.
        num_repeated: answered by repeating.
        num_agreed: whose answer is that of computing; computed windows always are.
    """

    num_windows: int
    num_repeated: int
    num_agreed: int

    @property
    def agreement(self) -> float:
        """Share of windows whose answer is that of computing."""
        return self.num_agreed / max(1, self.num_windows)

    @property
    def repeated(self) -> float:
        """Share of windows that were not computed."""
        return self.num_repeated / max(1, self.num_windows)


def thumbnails(frames: torch.Tensor) -> torch.Tensor:
    """Frames `[n, H, W, C]` uint8 as cells `[n, C, 16, 16]`, from 0 to 1."""
    values = frames.permute(0, 3, 1, 2).float() / 255
    return functional.adaptive_avg_pool2d(values, _CELLS)


def find_gate(videos: Sequence[Watched], *, min_agreement: float, max_repeats: int) -> Gate | None:
    """The gate that repeats most of those that agree well enough; None if none repeats anything.

    Raises:
        InputError: no videos.
    """
    if not videos:
        message = "a gate is found from at least one video, got none"
        raise InputError(message)
    best: tuple[float, Gate] | None = None
    for signal in SIGNALS:
        tables = [_changes(video.thumbnails, signal, max_repeats) for video in videos]
        for threshold in _thresholds(tables):
            gate = Gate(signal=signal, threshold=threshold, max_repeats=max_repeats)
            played = [
                _played(table, video.labels, gate)
                for table, video in zip(tables, videos, strict=True)
            ]
            total = _total(played)
            if _holds(total, min_agreement) and (best is None or total.repeated > best[0]):
                best = (total.repeated, gate)
    return None if best is None or best[0] == 0 else best[1]


def _holds(found: Replay, bar: float) -> bool:
    """Whether agreement is at least `bar`, by the lower end of the one-sided Wilson interval."""
    if found.num_agreed == found.num_windows:
        return True
    count, share = found.num_windows, found.agreement
    spread = _Z95 * math.sqrt(share * (1 - share) / count + (_Z95 / (2 * count)) ** 2)
    return (share + _Z95**2 / (2 * count) - spread) / (1 + _Z95**2 / count) >= bar


def replay(videos: Sequence[Watched], gate: Gate) -> Replay:
    """What `gate` would have done on `videos`."""
    return _total([
        _played(_changes(video.thumbnails, gate.signal, gate.max_repeats), video.labels, gate)
        for video in videos
    ])  # fmt: skip


def _changes(windows: torch.Tensor, signal: str, max_lag: int) -> list[list[float]]:
    """For every lag from 1: the signal between each window and the one so many before."""
    measure = SIGNALS[signal]
    table = []
    for lag in range(1, max_lag + 1):
        then = windows[: max(0, len(windows) - lag)]
        now = windows[lag:]
        table.append([
            float(value)
            for start in range(0, len(then), _AT_ONCE)
            for value in measure(now[start : start + _AT_ONCE] - then[start : start + _AT_ONCE])
        ])  # fmt: skip
    return table


def _thresholds(tables: Sequence[list[list[float]]]) -> list[float]:
    """Values that occur, evenly by rank; the smallest and the largest are among them."""
    values = sorted({value for table in tables for row in table for value in row})
    if len(values) <= _NUM_THRESHOLDS:
        return values
    step = (len(values) - 1) / (_NUM_THRESHOLDS - 1)
    return [values[round(step * index)] for index in range(_NUM_THRESHOLDS)]


def _played(table: list[list[float]], labels: Sequence[int], gate: Gate) -> Replay:
    computed, repeated, agreed = 0, 0, 0
    for index, label in enumerate(labels):
        lag = index - computed
        if 0 < lag <= gate.max_repeats and table[lag - 1][computed] <= gate.threshold:
            repeated += 1
            agreed += label == labels[computed]
        else:
            computed = index
            agreed += 1
    return Replay(num_windows=len(labels), num_repeated=repeated, num_agreed=agreed)


def _total(parts: Sequence[Replay]) -> Replay:
    return Replay(
        num_windows=sum(part.num_windows for part in parts),
        num_repeated=sum(part.num_repeated for part in parts),
        num_agreed=sum(part.num_agreed for part in parts),
    )
