"""Runs an artifact on videos, on a device that has no torch.

    deployed = vcompress.load_artifact("out/")
    for answer in deployed.answers(["camera.mp4"]):
        print(answer.video, answer.label, answer.score)

NumPy, PyAV and the package of one runtime are all that is imported. Everything that turns a video
into an input stands in the manifest. Decoding runs ahead in threads of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.calib.decode import read_frames
from vcompress.calib.live import live_frames
from vcompress.calib.preprocess import to_model_input
from vcompress.export.ahead import Ahead
from vcompress.export.sessions import Session, open_graph
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import BuildError, InputError

__all__ = ["Answer", "Deployed", "Start", "open_deployed"]

Array = npt.NDArray[Any]
Skipped = Callable[[str, InputError], None]
_DECODED_AHEAD = 4
# A folder may hold thousands of videos, and each has a decoder and frames of its own.
_MOST_STREAMS = 16
_TOP = 5


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the start took.

    Attributes:
        engine_seconds: the runtime's own: its import, and loading the model.
        other_seconds: everything else: reading the manifest and the labels.
    """

    engine_seconds: float
    other_seconds: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says of one clip.

    Attributes:
        video: as it was given.
        start_seconds, end_seconds: of the first and last frame of a window; None where the clip is
            the one that the manifest's sampling takes from the whole video.
        outputs: all outputs by name, without the batch axis.
        top: (label, probability) of the likeliest classes, best first; empty unless the artifact
            classifies.
    """

    video: str
    start_seconds: float | None
    end_seconds: float | None
    outputs: Mapping[str, Array]
    top: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str | None:
        """The likeliest class."""
        return self.top[0][0] if self.top else None

    @property
    def score(self) -> float | None:
        """Its probability."""
        return self.top[0][1] if self.top else None


@dataclass(frozen=True)
class _Clip:
    video: str
    start_seconds: float | None
    end_seconds: float | None
    value: Array


def open_deployed(
    path: str | Path, *, runtime: str = "onnxruntime", provider: str | None = None,
    threads: int | None = None,
) -> Deployed:  # fmt: skip
    """Load an artifact for running.

    Args:
        path: the artifact's directory.
        runtime: one of `sessions.RUNTIMES`.
        provider: the execution provider or device, in the words of the runtime; it must really be
            used. None for the CPU.
        threads: on the CPU; None for as many as the process may use.

    Raises:
        InputError: no artifact of a model of clips, or an unknown runtime.
        MissingCapabilityError: the runtime or the provider is not installed.
        BuildError: the runtime does not take the model, or fell back to another provider.
    """
    started = time.perf_counter()
    artifact = Artifact.open(Path(path))
    if artifact.manifest["clip"] is None:
        message = (
            f"{path} is a model of calls, not of videos; put it back into its pipeline with "
            "vcompress.compressed"
        )
        raise InputError(message)
    spec = ClipSpec.from_dict(artifact.manifest["clip"])
    labels = _labels(artifact)
    middle = time.perf_counter()
    session = open_graph(artifact, runtime, provider=provider, threads=threads)
    start = Start(
        engine_seconds=time.perf_counter() - middle, other_seconds=middle - started
    )  # fmt: skip
    return Deployed(artifact, session, spec, labels, runtime, start)


class Deployed:
    """A loaded artifact. Made by `open_deployed`."""

    def __init__(
        self, artifact: Artifact, session: Session, spec: ClipSpec, labels: tuple[str, ...],
        runtime: str, start: Start,
    ) -> None:  # fmt: skip
        self.artifact, self.session, self.clip, self.labels = artifact, session, spec, labels
        self.runtime, self.start = runtime, start

    @property
    def name(self) -> str:
        """Of the model."""
        return str(self.artifact.manifest["name"])

    @property
    def providers(self) -> tuple[str, ...]:
        """What really computes, read back from the runtime."""
        return self.session.providers

    @property
    def max_batch(self) -> int | None:
        """Clips that one run takes; None for any number."""
        return self.session.input_shape[0]

    def run(self, inputs: Array) -> dict[str, Array]:
        """All outputs for inputs `[n, *clip.input_shape]`; n may be any number."""
        size = self.max_batch
        if size is None:
            return self.session.run_named({self.session.input_names[0]: inputs})
        parts = [self._padded(inputs[at : at + size], size) for at in range(0, len(inputs), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def answers(
        self, videos: Iterable[str | Path], *, batch: int = 1, skipped: Skipped | None = None
    ) -> Iterator[Answer]:
        """One answer a video, from the clip that the manifest's sampling takes.

        Args:
            videos: files.
            batch: clips in one run.
            skipped: called with the name of a video that cannot be used and why; without it the
                error is raised.
        """
        clips = Ahead(self._centers(videos, skipped), max(batch, _DECODED_AHEAD))
        try:
            yield from self._answered(clips, batch)
        finally:
            clips.close()

    def windows(
        self, videos: Sequence[str | Path], *, stride: int, batch: int = 1,
        skipped: Skipped | None = None,
    ) -> Iterator[Answer]:  # fmt: skip
        """Answers over a sliding window, of up to 16 videos in turn, each decoded in a thread.

        Args:
            videos: files; the next 16 begin when all windows of these are answered.
            stride: new frames of each window, as the model sees them.
            batch: windows in one run, of one or of several videos.
            skipped: as in `answers`; what was answered before the damage stays answered.
        """
        for first in range(0, len(videos), _MOST_STREAMS):
            some = videos[first : first + _MOST_STREAMS]
            streams = [Ahead(self._sliding(video, stride), _DECODED_AHEAD) for video in some]
            try:
                yield from self._answered(_in_turn(streams, some, skipped), batch)
            finally:
                for stream in streams:
                    stream.close()

    def check(self) -> float:
        """Run the golden clips of the artifact here; the relative L2 error of the outputs.

        Raises:
            InputError: the artifact has none, or of another shape than its input.
            BuildError: the error is above what the manifest allows.
        """
        golden = self.artifact.manifest.get("golden")
        if not golden:
            message = f"{self.artifact.path} has no golden clips; make the artifact again"
            raise InputError(message)
        with np.load(self.artifact.path / golden["file"], allow_pickle=False) as arrays:
            inputs, wanted = arrays[golden["inputs"]], arrays[golden["outputs"]]
        got = self.run(inputs)[self.session.output_names[0]]
        error = float(
            np.linalg.norm(np.subtract(got, wanted, dtype=np.float64)) / np.linalg.norm(wanted)
        )
        # Also where it is not a number.
        if not error <= golden["max"]:
            message = (
                f"{self.artifact.path} computes something else on {', '.join(self.providers)}: "
                f"relative L2 {error:.1e} on the golden clips, {golden['max']:.0e} is allowed; run "
                "it on another provider, or make it again for this device"
            )
            raise BuildError(message)
        return error

    def _padded(self, inputs: Array, size: int) -> dict[str, Array]:
        missing = size - len(inputs)
        filled = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)])
        outputs = self.session.run_named({self.session.input_names[0]: filled})
        return {name: output[: len(inputs)] for name, output in outputs.items()}

    def _centers(self, videos: Iterable[str | Path], skipped: Skipped | None) -> Iterator[_Clip]:
        for video in videos:
            try:
                frames = read_frames(Path(video), self.clip)
            except InputError as error:
                if skipped is None:
                    raise
                skipped(str(video), error)
                continue
            yield _Clip(str(video), None, None, to_model_input(frames, self.clip))

    def _sliding(self, video: str | Path, stride: int) -> Iterator[_Clip]:
        length, count = self.clip.num_frames, 0
        held: deque[tuple[float, Array]] = deque(maxlen=length)
        for frame in live_frames(Path(video), self.clip):
            held.append(frame)
            count += 1
            if count >= length and (count - length) % stride == 0:
                yield self._window(video, list(held))
        if 0 < count < length:
            # As in a clip of a whole video, the last frame stands in for those that are missing.
            yield self._window(video, [*held, *[held[-1]] * (length - count)])

    def _window(self, video: str | Path, frames: Sequence[tuple[float, Array]]) -> _Clip:
        value = to_model_input(np.stack([pixels for _, pixels in frames]), self.clip)
        return _Clip(str(video), frames[0][0], frames[-1][0], value)

    def _answered(self, clips: Iterable[_Clip], batch: int) -> Iterator[Answer]:
        waiting: list[_Clip] = []
        for clip in chain(clips, (None,)):
            if clip is not None:
                waiting.append(clip)
            if waiting and (clip is None or len(waiting) >= batch):
                outputs = self.run(np.stack([one.value for one in waiting]))
                for place, one in enumerate(waiting):
                    yield self._answer(one, {name: out[place] for name, out in outputs.items()})
                waiting = []

    def _answer(self, clip: _Clip, outputs: dict[str, Array]) -> Answer:
        top: tuple[tuple[str, float], ...] = ()
        scores = outputs[self.session.output_names[0]]
        if self.artifact.manifest["task"] == "classify" and scores.ndim == 1:
            shifted = np.exp(scores.astype(np.float64) - scores.max())
            shares = shifted / shifted.sum()
            best = np.argsort(-shares, kind="stable")[:_TOP]
            top = tuple((self._label(int(index)), float(shares[index])) for index in best)
        return Answer(
            video=clip.video, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds,
            outputs=outputs, top=top,
        )  # fmt: skip

    def _label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else str(index)


def _labels(artifact: Artifact) -> tuple[str, ...]:
    name = artifact.manifest.get("labels")
    if not name:
        return ()
    return tuple((artifact.path / str(name)).read_text(encoding="utf-8").splitlines())


def _in_turn(
    streams: Sequence[Ahead[_Clip]], videos: Sequence[str | Path], skipped: Skipped | None
) -> Iterator[_Clip]:
    """One window of each video after the other, until all have ended."""
    running = dict(enumerate(streams))
    while running:
        for place, stream in list(running.items()):
            try:
                yield next(stream)
            except StopIteration:
                del running[place]
            except InputError as error:
                del running[place]
                if skipped is None:
                    raise
                skipped(str(videos[place]), error)
