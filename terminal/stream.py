"""What a person or a program sees of a stream: one line a window, as soon as it is known."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcompress.pipeline.stream import StreamSummary, VideoStream, Window

__all__ = ["print_stream"]


def print_stream(windows: VideoStream, *, as_json: bool) -> None:
    """Print what `windows` gives, and at its end, or where it is interrupted, what it cost."""
    try:
        _head(windows, as_json)
        try:
            for window in windows:
                _line(window, as_json)
        finally:
            _tail(windows, as_json)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    print(text, flush=True)


def _json(data: dict[str, object]) -> None:
    _print(json.dumps({"schema": 1, **data}, allow_nan=False))


def _head(windows: VideoStream, as_json: bool) -> None:
    reuse = windows.reuse
    if as_json:
        _json({
            "stream": windows.model, "window": windows.window, "stride": windows.stride,
            "reuse": reuse.as_dict(),
        })  # fmt: skip
        return
    _print(f"model    {windows.model}, window {windows.window}, stride {windows.stride}")
    _print(f"reuse    {reuse.kind}: {reuse.reason}")
    _print(f"{'from s':>9} {'to s':>9} {'score':>7}  label")


def _line(window: Window, as_json: bool) -> None:
    if as_json:
        _json(window.as_dict())
        return
    score = "" if window.score is None else f"{window.score:.1%}"
    label = "-" if window.label is None else window.label
    repeated = "  (repeated)" if window.repeated else ""
    _print(f"{window.start_seconds:9.2f} {window.time_seconds:9.2f} {score:>7}  {label}{repeated}")


def _tail(windows: VideoStream, as_json: bool) -> None:
    summary = windows.summary
    if as_json:
        _json({"summary": summary.as_dict(), "reuse": windows.reuse.kind})
        return
    repeated = f", {summary.num_repeated} of them repeated" if summary.num_repeated else ""
    _print(f"windows  {summary.num_windows} over {summary.num_frames} frames{repeated}")
    if summary.num_checked:
        _print(
            f"check    {summary.num_equal} of {summary.num_checked} windows computed both ways are "
            "equal bit for bit"
        )
    _print(f"speed    {_speed(summary)}")


def _speed(summary: StreamSummary) -> str:
    if summary.window_ms is None:
        return "not measured: one window only"
    text = f"{summary.window_ms:.1f} ms a window"
    if summary.speed_up is None or summary.recompute_ms is None:
        return text
    text += f", {summary.recompute_ms:.1f} ms anew: {summary.speed_up:.2f}x"
    if summary.speed_up_with_decoding is not None:
        text += f", {summary.speed_up_with_decoding:.2f}x with decoding"
    return text
