"""What a stream cost: counts and times, of both ways where both were gone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

__all__ = ["StreamClock", "StreamSummary"]


@dataclass(frozen=True, kw_only=True)
class StreamSummary:
    """What a stream cost.

    Times are of preparing and running the model: medians, or means where answers are repeated.

    Attributes:
        window_ms: of a window as it was answered; None before the second.
        recompute_ms: of the same windows anew, where both were done, in turn.
        decode_ms: of the new frames of a window.
        num_checked, num_equal: windows computed both ways, and those that came out equal to the
            last bit.
        speed_up: anew over as answered; with approximate reuse over all windows, computed ones
            included.
        speed_up_with_decoding: the same when decoding counts on both sides.
    """

    num_frames: int = 0
    num_windows: int = 0
    num_repeated: int = 0
    num_checked: int = 0
    num_equal: int = 0
    window_ms: float | None = None
    recompute_ms: float | None = None
    decode_ms: float | None = None
    speed_up: float | None = None
    speed_up_with_decoding: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class StreamClock:
    """Times of windows and of their parts, of which a fixed number is kept."""

    _KEPT = 1024

    def __init__(self) -> None:
        self._decode: list[float] = []
        self._answer: list[float] = []
        self._both: list[tuple[float, float]] = []
        self._all, self._computed = (0.0, 0), (0.0, 0)

    def decoded(self, seconds: float) -> None:
        """The new frames of a window came."""
        self._decode = [*self._decode, seconds][-self._KEPT :]

    def answered(self, seconds: float, *, repeated: bool) -> None:
        """A window was answered."""
        self._answer = [*self._answer, seconds][-self._KEPT :]
        self._all = (self._all[0] + seconds, self._all[1] + 1)
        if not repeated:
            self._computed = (self._computed[0] + seconds, self._computed[1] + 1)

    def compared(self, answered: float, anew: float) -> None:
        """A window was answered and computed anew, in seconds each."""
        self._both = [*self._both, (answered, anew)][-self._KEPT :]

    def added_to(self, counts: StreamSummary, *, approximate: bool) -> StreamSummary:
        """`counts` with the times."""
        # The first window decodes all of its frames.
        decode = median(self._decode[1:]) if len(self._decode) > 1 else 0.0
        answer = median(self._answer) if self._answer else None
        anew = None
        if approximate and self._computed[1]:
            answer, anew = self._all[0] / self._all[1], self._computed[0] / self._computed[1]
        elif self._both:
            answer, anew = (median(values) for values in zip(*self._both, strict=True))
        timed = replace(
            counts, window_ms=None if answer is None else 1e3 * answer, decode_ms=1e3 * decode
        )
        if answer is None or anew is None:
            return timed
        return replace(
            timed, recompute_ms=1e3 * anew, speed_up=anew / answer,
            speed_up_with_decoding=(anew + decode) / (answer + decode),
        )  # fmt: skip
