"""The three ways to answer a sliding window: anew, from kept features, or by repeating.

All of them are fed the new frames of a window and hold buffers of fixed size.

Shapes: T frames of a window, n new frames, H W C rows, columns and channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vcompress.calib.preprocess import to_model_input
from vcompress.compress.stream.change import SIGNALS, Gate, thumbnails
from vcompress.compress.stream.ring import Ring
from vcompress.compress.stream.stages import Stages
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec

__all__ = ["Answer", "Answering", "Frames", "Recomputing", "Repeating", "Reusing", "model_input"]

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The output for one window, and whether it is that of an earlier one."""

    output: torch.Tensor
    repeated: bool = False


class Answering(Protocol):
    """Answers windows, one after the other."""

    def step(self, frames: Frames) -> Answer:
        """The answer for the window that ends with `frames` `[n, H, W, C]`; T at first."""
        ...


def model_input(frames: Frames, clip: ClipSpec) -> torch.Tensor:
    """Frames `[n, H, W, C]` as one input of n frames `[1, ...]`."""
    spec = replace(clip, num_frames=len(frames))
    return torch.from_numpy(to_model_input(frames, spec))[None]


class Recomputing:
    """Every window anew."""

    def __init__(self, model: VideoModel, clip: ClipSpec) -> None:
        self._model, self._clip = model, clip
        self._frames = Ring(clip.num_frames)

    def push(self, frames: Frames) -> None:
        """Take new frames without answering."""
        self._frames.push(torch.from_numpy(frames))

    def frames(self) -> Frames:
        """The newest T frames."""
        frames: Frames = self._frames.ordered().numpy()
        return frames

    def answer(self) -> torch.Tensor:
        """The output for the newest T frames."""
        return self._model(model_input(self.frames(), self._clip))

    def step(self, frames: Frames) -> Answer:
        """See `Answering`."""
        self.push(frames)
        return Answer(output=self.answer())


class Reusing:
    """Only new frames are encoded; the features of the others are kept."""

    def __init__(self, stages: Stages, clip: ClipSpec) -> None:
        self._stages, self._clip = stages, clip
        self._features = Ring(stages.rows)

    def step(self, frames: Frames) -> Answer:
        """See `Answering`."""
        for start in range(0, len(frames), self._stages.chunk):
            chunk = frames[start : start + self._stages.chunk]
            self._features.push(self._stages.encode(model_input(chunk, self._clip)))
        return Answer(output=self._stages.answer(self._features.ordered()))


class Repeating:
    """The last answer as long as `gate` sees no change, else anew."""

    def __init__(self, model: VideoModel, clip: ClipSpec, gate: Gate) -> None:
        self._computed = Recomputing(model, clip)
        self._gate, self._signal = gate, SIGNALS[gate.signal]
        self._cells = Ring(clip.num_frames)
        self._then = self._output = torch.empty(0)
        self._repeats = gate.max_repeats

    def step(self, frames: Frames) -> Answer:
        """See `Answering`."""
        self._computed.push(frames)
        self._cells.push(thumbnails(torch.from_numpy(frames)))
        now = self._cells.ordered()
        if (
            self._repeats < self._gate.max_repeats
            and float(self._signal(now - self._then)) <= self._gate.threshold
        ):
            self._repeats += 1
            return Answer(output=self._output, repeated=True)
        self._repeats = 0
        self._then = now.clone()
        self._output = self._computed.answer()
        return Answer(output=self._output)
