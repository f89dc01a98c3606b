"""Which reuse a stream gets: exact, approximate or none, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vcompress.calib.clips import permutation
from vcompress.calib.folder import find_videos
from vcompress.calib.live import live_frames
from vcompress.compress.stream.change import (
    Gate,
    Replay,
    Watched,
    find_gate,
    replay,
    thumbnails,
)
from vcompress.compress.stream.cut import Cut, Uncut, find_cut
from vcompress.compress.stream.ring import Ring
from vcompress.compress.stream.stages import Stages
from vcompress.compress.stream.windows import Answering, Frames, Recomputing, Repeating, Reusing
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Progress
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["Chosen", "Reuse", "choose_reuse"]

Kind = Literal["exact", "approximate", "none"]
_WORDS = ("auto", "exact", "approximate", "none")
_MAX_WINDOWS = 1000  # of calibration and of proof each; their cells take about 50 kB a window
_MIN_REPEATED = 0.05


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What is kept from window to window.

    Attributes:
        kind: "exact": features of frames, to the same result as computing anew; "approximate":
            answers while the stream does not change; "none".
        reason: in words.
        module: behind which features are kept.
        chunk: frames that are encoded at a time.
        operations: of a window that are left, as a share of the model's.
        difference: between the model on a whole window and on its frames a few at a time, as a
            share of the largest output; 0 if all bits are equal.
        gate: of an approximate reuse.
        proof: how it did on videos that it was not found on.
    """

    kind: Kind
    reason: str
    module: str | None = None
    chunk: int | None = None
    operations: float | None = None
    difference: float = 0.0
    gate: Gate | None = None
    proof: Replay | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        proof = self.proof and {
            "num_windows": self.proof.num_windows, "agreement": self.proof.agreement,
            "repeated": self.proof.repeated,
        }  # fmt: skip
        return {
            "kind": self.kind, "reason": self.reason, "module": self.module,
            "frames_at_a_time": self.chunk, "operations_share": self.operations,
            "difference": self.difference,
            "gate": self.gate and self.gate.as_dict(), "proof": proof,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A reuse and what carries it out; `stages` only of an exact one."""

    reuse: Reuse
    answering: Answering
    stages: Stages | None = None


def choose_reuse(
    model: VideoModel, clip: ClipSpec, *, stride: int, reuse: str, calib: str | None,
    min_agreement: float, progress: Progress, gate: Gate | None = None,
) -> Chosen:  # fmt: skip
    """The reuse for windows of `clip`, see `pipeline.stream.stream`.

    Raises:
        InputError: it was asked for and cannot be had.
    """
    if reuse not in _WORDS:
        message = f"--reuse must be one of {', '.join(_WORDS)}, got {reuse!r}"
        raise InputError(message)
    if not 0 < min_agreement <= 1:
        message = f"--min-agreement must be above 0 and at most 1, got {min_agreement:g}"
        raise InputError(message)
    if reuse == "approximate" and calib is None:
        message = "--reuse approximate is found on videos: add --calib with a folder of them"
        raise InputError(message)
    if gate is not None:
        known = Reuse(kind="approximate", reason="the gate of an earlier stream", gate=gate)
        return Chosen(reuse=known, answering=Repeating(model, clip, gate))
    anew = Recomputing(model, clip)
    if reuse == "none":
        return Chosen(reuse=Reuse(kind="none", reason="as asked for"), answering=anew)
    reasons = []
    if reuse != "approximate":
        with progress.stage("find reuse"):
            found = _exact(model, clip, stride)
        if isinstance(found, Chosen):
            return found
        reasons.append(f"{model.name} {found.reason}")
        if reuse == "exact":
            message = f"--reuse exact is impossible: {reasons[0]}"
            raise InputError(message)
    if calib is None:
        if model.task == "classify":
            reasons.append("--calib VIDEOS would find out whether answers can be repeated")
    else:
        result = _approximate(model, clip, stride, Path(calib), min_agreement, progress)
        if isinstance(result, Chosen):
            return result
        reasons.append(result)
        if reuse == "approximate":
            message = f"--reuse approximate is impossible: {result}"
            raise InputError(message)
    return Chosen(reuse=Reuse(kind="none", reason="; ".join(reasons)), answering=anew)


def _exact(model: VideoModel, clip: ClipSpec, stride: int) -> Chosen | Uncut:
    if stride == clip.num_frames:
        return Uncut(reason="sees every frame once: its windows do not overlap")
    cut = find_cut(model, clip, stride=stride)
    if not isinstance(cut, Cut):
        return cut
    reason = f"features behind {cut.module} are kept; {cut.operations:.0%} of the operations left"
    if cut.difference:
        reason += (
            f"; equal bit for bit to frames taken {cut.stages.chunk} at a time, and within "
            f"{cut.difference:.0e} of the model on a window at once"
        )
    known = Reuse(
        kind="exact", reason=reason, module=cut.module, chunk=cut.stages.chunk,
        operations=cut.operations, difference=cut.difference,
    )  # fmt: skip
    return Chosen(reuse=known, answering=Reusing(cut.stages, clip), stages=cut.stages)


def _approximate(
    model: VideoModel, clip: ClipSpec, stride: int, folder: Path, min_agreement: float,
    progress: Progress,
) -> Chosen | str:  # fmt: skip
    """A gate that holds the bar on videos that it was not found on, or why there is none."""
    if model.task != "classify":
        return f"answers are repeated by their top class, but the task is {model.task}"
    videos = _videos(folder)
    half = len(videos) // 2
    order = [videos[index] for index in permutation(len(videos), 0)]
    with progress.stage("calibrate", len(videos)) as advance:
        watched = _watched(model, clip, stride, order[: len(order) - half], progress, advance)
        others = _watched(model, clip, stride, order[len(order) - half :], progress, advance)
    if not watched or not others:
        message = f"{folder}: two videos must be longer than a window of {clip.num_frames} frames"
        raise InputError(message)
    max_repeats = max(1, clip.num_frames // stride)
    gate = find_gate(watched, min_agreement=min_agreement, max_repeats=max_repeats)
    if gate is None:
        return f"no answer of {folder} can be repeated at an agreement of {min_agreement:.1%}"
    proof = replay(others, gate)
    if proof.agreement < min_agreement:
        return (
            f"repeating answers agrees in {proof.agreement:.2%} of the windows of other videos, "
            f"{min_agreement:.2%} are asked for; give more videos, or ask for less"
        )
    if proof.repeated < _MIN_REPEATED:
        return (
            f"only {proof.repeated:.1%} of the answers of other videos can be repeated, which "
            "does not pay"
        )
    reason = (
        f"the last answer is repeated while the stream changes by at most {gate.threshold:.2g} "
        f"({gate.signal}); on other videos {proof.repeated:.0%} of {proof.num_windows} windows "
        f"were repeated and {proof.agreement:.2%} agreed with computing"
    )
    known = Reuse(kind="approximate", reason=reason, gate=gate, proof=proof)
    return Chosen(reuse=known, answering=Repeating(model, clip, gate))


def _videos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        message = f"--calib must be a folder of videos, got {folder}, which is none"
        raise InputError(message)
    videos = [folder / name for name in find_videos(folder).videos]
    if len(videos) < 2:
        message = f"--calib must hold two videos at least, {folder} holds {len(videos)}"
        raise InputError(message)
    return videos


def _watched(
    model: VideoModel, clip: ClipSpec, stride: int, videos: Sequence[Path], progress: Progress,
    advance: Any,
) -> list[Watched]:  # fmt: skip
    """Compute every window of `videos`, as far as the limit goes."""
    found: list[Watched] = []
    left = _MAX_WINDOWS
    for path in videos:
        advance(1)
        try:
            cells, labels = _watch(model, clip, stride, path, left)
        except InputError as error:
            progress.warn(f"not used for calibration: {error}")
            continue
        if labels:
            found.append(Watched(thumbnails=torch.stack(cells), labels=labels))
            left -= len(labels)
    return found


def _watch(
    model: VideoModel, clip: ClipSpec, stride: int, path: Path, limit: int
) -> tuple[list[torch.Tensor], list[int]]:
    anew, kept = Recomputing(model, clip), Ring(clip.num_frames)
    cells, labels = [], []
    for frames in islice(_steps(path, clip, stride), limit):
        kept.push(thumbnails(torch.from_numpy(frames)))
        cells.append(kept.ordered().clone())
        labels.append(int(anew.step(frames).output.flatten().argmax()))
    return cells, labels


def _steps(path: Path, clip: ClipSpec, stride: int) -> Iterator[Frames]:
    frames = live_frames(path, clip)
    size = clip.num_frames
    while len(taken := [frame for _, frame in islice(frames, size)]) == size:
        yield np.stack(taken)
        size = stride
