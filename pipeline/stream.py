"""`vcompress stream`: one answer a window over a video that may never end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vcompress.calib.live import TimedFrame, fitted_frames, live_frames
from vcompress.calib.sniff import printable
from vcompress.compress.stream.change import Gate
from vcompress.compress.stream.windows import Answer, Answering, Frames, Recomputing, Reusing
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Progress, Silent
from vcompress.pipeline.stream_clock import StreamClock, StreamSummary
from vcompress.pipeline.stream_reuse import Chosen, Reuse, choose_reuse
from vcompress.spec.clip import ClipSpec
from vcompress.spec.defaults import MIN_AGREEMENT, NUM_CHECKS
from vcompress.spec.errors import InputError

__all__ = ["StreamSummary", "VideoStream", "Window", "stream"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """The answer for one window.

    Attributes:
        index: from 0.
        start_seconds, time_seconds: of its first and its last frame, from the first of the stream.
        label: the top class, by name or number; None if the model does not classify.
        score: its probability, by softmax.
        repeated: the answer is that of an earlier window.
        output: the primary output, `[1, ...]`.
    """

    index: int
    start_seconds: float
    time_seconds: float
    label: str | None
    score: float | None
    repeated: bool
    output: torch.Tensor

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the output."""
        return {
            "window": self.index, "start_seconds": round(self.start_seconds, 6),
            "time_seconds": round(self.time_seconds, 6), "label": self.label,
            "score": None if self.score is None else round(self.score, 6),
            "repeated": self.repeated,
        }  # fmt: skip


def stream(
    source: str | VideoModel, video: str | Path | Iterable[TimedFrame], *,
    window: int | None = None, stride: int = 1, reuse: str = "auto", calib: str | None = None,
    gate: Gate | None = None, min_agreement: float = MIN_AGREEMENT, num_checks: int = NUM_CHECKS,
    load: LoadOptions | None = None, progress: Progress | None = None,
) -> VideoStream:  # fmt: skip
    """Answers of a recogniser over a sliding window, as an iterator of `Window`.

    Args:
        source: the model.
        video: a file; or (seconds, frame) pairs, frames `[H, W, 3]` uint8 RGB of any size.
        window: frames; the model's own number if left out.
        stride: new frames of each window, counted in frames that the model sees.
        reuse: "exact", "approximate", "none", or "auto": exact where it is possible, approximate
            where `calib` is given and it holds, else none.
        calib: a folder of at least two videos, on which an approximate reuse is found and proved.
        gate: `reuse.gate` of an earlier stream of the same model, window and stride, in place of
            `calib`.
        min_agreement: share of windows of other videos that an approximate reuse must answer as
            computing would.
        num_checks: windows that are computed both ways, for the proof and for the speed-up.

    Raises:
        InputError: the model, the video or a number is wrong. What is damaged in the video is
            raised where it comes, by the iterator.
    """
    progress = progress or Silent()
    if isinstance(source, str):
        with progress.stage("load"):
            source = load_model(source, load)
    clip = _window_of(source, window, stride)
    frames = (
        live_frames(Path(video), clip)
        if isinstance(video, str | Path)
        else fitted_frames(video, clip)
    )
    first = list(islice(frames, clip.num_frames))
    if len(first) < clip.num_frames:
        name = printable(video) if isinstance(video, str | Path) else "the stream"
        message = (
            f"{name}: a window takes {clip.num_frames} frames, there are only {len(first)}; give a "
            "longer video, or a smaller --clip-stride or higher --fps if one is set"
        )
        raise InputError(message)
    if source.task != "classify":
        progress.warn(
            f"the task of {source.name} is {source.task}: windows have an output and no label; "
            "add --task classify if its output are classes"
        )
    chosen = choose_reuse(
        source, clip, stride=stride, reuse=reuse, calib=calib, gate=gate,
        min_agreement=min_agreement, progress=progress,
    )  # fmt: skip
    return VideoStream(
        model=source, clip=clip, stride=stride, frames=chain(first, frames), chosen=chosen,
        num_checks=num_checks, progress=progress,
    )  # fmt: skip


def _window_of(model: VideoModel, window: int | None, stride: int) -> ClipSpec:
    clip = model.clip
    if window is not None and window != clip.num_frames:
        clip = replace(clip, num_frames=window)
        try:
            model(replace(model, inputs=clip).example())
        except Exception as error:
            # Every model says in its own way that it does not take so many frames.
            message = (
                f"--window must be what {model.name} takes, {model.clip.num_frames} frames; got "
                f"{window}, on which it fails ({type(error).__name__}); leave --window out"
            )
            raise InputError(message) from error
    if not 1 <= stride <= clip.num_frames:
        message = (
            f"--stride must be from 1 to the window's {clip.num_frames} frames, got {stride}; "
            "beyond that, frames between two windows would never be seen"
        )
        raise InputError(message)
    return clip


class VideoStream:
    """An iterator over the windows of a stream; memory does not grow with its length.

    Attributes:
        model: its name.
        window, stride: in frames.
        reuse: what is kept from window to window, and why.
    """

    def __init__(
        self, *, model: VideoModel, clip: ClipSpec, stride: int, frames: Iterator[TimedFrame],
        chosen: Chosen, num_checks: int, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.window, self.stride = model.name, clip.num_frames, stride
        self.reuse: Reuse = chosen.reuse
        self._model, self._clip, self._progress = model, clip, progress
        self._frames, self._answering, self._stages = frames, chosen.answering, chosen.stages
        self._anew = Recomputing(model, clip) if self._stages is not None and num_checks else None
        self._num_checks = num_checks
        self._clock = StreamClock()
        self._counts = StreamSummary()
        self._windows = self._run()

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> Window:
        return next(self._windows)

    @property
    def summary(self) -> StreamSummary:
        """What the stream cost so far."""
        return self._clock.added_to(self._counts, approximate=self.reuse.kind == "approximate")

    def _run(self) -> Iterator[Window]:
        times = np.zeros(self.window)
        size = self.window
        while True:
            started = time.perf_counter()
            taken = list(islice(self._frames, size))
            if len(taken) < size:
                return
            times = np.append(times, [seconds for seconds, _ in taken])[-self.window :]
            pixels = np.stack([frame for _, frame in taken])
            self._clock.decoded(time.perf_counter() - started)
            answer = self._answer(pixels)
            label, score = _top(self._model, answer.output)
            counts = self._counts
            self._counts = replace(
                counts, num_frames=counts.num_frames + size, num_windows=counts.num_windows + 1,
                num_repeated=counts.num_repeated + answer.repeated,
            )  # fmt: skip
            yield Window(
                index=counts.num_windows, start_seconds=float(times[0]),
                time_seconds=float(times[-1]), label=label, score=score,
                repeated=answer.repeated, output=answer.output,
            )  # fmt: skip
            size = self.stride

    def _answer(self, pixels: Frames) -> Answer:
        first = self._counts.num_windows == 0
        if self._anew is not None:
            self._anew.push(pixels)
            if not first:
                return self._checked(self._answering, self._anew, pixels)
        started = time.perf_counter()
        answer = self._answering.step(pixels)
        if not first:
            self._clock.answered(time.perf_counter() - started, repeated=answer.repeated)
        return answer

    def _checked(self, answering: Answering, anew: Recomputing, pixels: Frames) -> Answer:
        """One window both ways, in turn the one and the other first."""
        swapped = self._counts.num_checked % 2 == 1
        moments = [time.perf_counter()]
        expected = anew.answer() if swapped else None
        moments.append(time.perf_counter())
        answer = answering.step(pixels)
        moments.append(time.perf_counter())
        expected = anew.answer() if expected is None else expected
        moments.append(time.perf_counter())
        self._clock.answered(moments[2] - moments[1], repeated=False)
        self._clock.compared(
            moments[2] - moments[1], moments[1] - moments[0] if swapped else moments[3] - moments[2]
        )
        if self.reuse.difference:
            # The model's own last bits depend on how many frames it is given at a time.
            assert self._stages is not None
            expected = Reusing(self._stages, self._clip).step(anew.frames()).output
        equal = torch.equal(answer.output, expected)
        self._counts = replace(
            self._counts, num_checked=self._counts.num_checked + 1,
            num_equal=self._counts.num_equal + equal,
        )  # fmt: skip
        if not equal:
            reason = (
                f"window {self._counts.num_windows} from kept features is not that computed anew; "
                "all are computed anew from here on"
            )
            self._progress.warn(reason)
            self.reuse = Reuse(kind="none", reason=reason)
            self._answering, self._anew = anew, None
            return Answer(output=expected)
        if self._counts.num_checked >= self._num_checks:
            self._anew = None
        return answer


def _top(model: VideoModel, output: torch.Tensor) -> tuple[str | None, float | None]:
    """The top class of logits `[1, K]` and its probability."""
    if model.task != "classify" or output.dim() != 2:
        return None, None
    shares = output[0].double().softmax(dim=0)
    index = int(shares.argmax())
    name = model.labels[index] if index < len(model.labels) else str(index)
    return name, float(shares[index])
