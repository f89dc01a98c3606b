"""Where clips and calls come from: the user's files, or what ships with the reference models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from vcompress.calib.calls import Calls, Samples, load_calls
from vcompress.calib.clips import Clips
from vcompress.calib.load import load_clips
from vcompress.models.reference.catalog import Part, reference_clips
from vcompress.spec.clip import ClipSpec
from vcompress.spec.defaults import NUM_TEST_CLIPS
from vcompress.spec.errors import InputError
from vcompress.spec.files import check_clips

__all__ = ["REFERENCE_PREFIX", "ClipRequest", "ClipSets", "open_clip_sets", "open_clips"]

REFERENCE_PREFIX = "reference:"
# Held out of the calibration clips where the user names no test clips.
_TEST_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Which clips: enough to open the same ones again.

    Attributes:
        calib: a path, or `reference:NAME`.
        data: test clips, or None (see `open_clip_sets`).
        num_clips: of calibration, at most.
        num_test_clips: at most; None for a quarter of the clips, where these are held out of
            `calib`, and for 1,000 otherwise.
        seed: of the draw.
    """

    calib: str
    data: str | None
    num_clips: int
    num_test_clips: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class ClipSets:
    """Calibration clips, test clips, the source of the latter, and what was skipped and why.

    For a model that takes named tensors they are recorded calls.
    """

    calibration: Samples
    test: Samples
    test_source: str
    skipped: tuple[tuple[str, str], ...]


def open_clips(
    source: str, spec: ClipSpec, *, part: Part, limit: int, seed: int, labels: tuple[str, ...]
) -> Clips:
    """At most `limit` clips of `source`, drawn with `seed`.

    Args:
        source: a path, or `reference:NAME`; only the latter has two parts.
        labels: class names that folders are matched with.
    """
    if source.startswith(REFERENCE_PREFIX):
        frames, classes, names = reference_clips(
            source.removeprefix(REFERENCE_PREFIX), part, limit=limit, seed=seed
        )
        return Clips.from_frames(frames, spec, labels=classes, names=names)
    check_clips(source)
    return load_clips(source, spec, limit=limit, seed=seed, label_names=labels or None)


def open_clip_sets(
    request: ClipRequest, spec: ClipSpec | None, labels: tuple[str, ...]
) -> ClipSets:
    """Calibration clips, and test clips that calibration never sees.

    Without `data` the test clips of a reference task are its test set; those of a folder are held
    out of `calib` by `seed`: a quarter of what is drawn, or as many as are asked for and left.
    Which clips calibrate does not depend on how many test.

    Args:
        spec: of the clips; None for a model that takes named tensors.
    """
    if spec is None:
        return _open_call_sets(request)
    calib, seed, data = request.calib, request.seed, request.data
    test_limit = request.num_test_clips or NUM_TEST_CLIPS
    if data is None and calib.startswith(REFERENCE_PREFIX):
        data = calib
    if data is not None:
        calibration = open_clips(
            calib, spec, part="calibration", limit=request.num_clips, seed=seed, labels=labels
        )
        test = open_clips(data, spec, part="test", limit=test_limit, seed=seed, labels=labels)
        _refuse_overlap(calibration, test)
        skipped = (*calibration.skipped, *test.skipped)
        return ClipSets(calibration=calibration, test=test, test_source=data, skipped=skipped)
    wanted = max(request.num_clips + 1, round(request.num_clips / (1 - _TEST_SHARE)))
    everything = open_clips(calib, spec, part="calibration", limit=wanted, seed=seed, labels=labels)
    if len(everything) < 2:
        message = (
            f"{calib} holds one usable clip; at least two are needed, one to calibrate and one to "
            "test; add clips, or name test clips with --data"
        )
        raise InputError(message)
    test, calibration = everything.split(_TEST_SHARE, seed)
    skipped = everything.skipped
    if request.num_test_clips is not None:
        test_limit = request.num_test_clips
        if len(test) < test_limit and len(everything) == wanted:
            # There may be more: drawn again, with those that were already taken left out.
            more = open_clips(
                calib, spec, part="test", limit=wanted + test_limit, seed=seed, labels=labels
            )
            test, skipped = _without(more, calibration), more.skipped
        test = test.subset(range(min(test_limit, len(test))))
    return ClipSets(
        calibration=replace(calibration, skipped=skipped),
        test=test,
        test_source=f"{calib} (held out)",
        skipped=skipped,
    )


def _without(clips: Clips, taken: Clips) -> Clips:
    """The clips that are not among `taken`, told by their names and by their frames."""
    names, frames = set(taken.names), {sha256(clip).digest() for clip in taken.data}
    return clips.subset([
        index
        for index, name in enumerate(clips.names)
        if name not in names and sha256(clips.data[index]).digest() not in frames
    ])  # fmt: skip


def _open_call_sets(request: ClipRequest) -> ClipSets:
    """Recorded calls; without `data` a quarter of the generations is held out by `seed`."""
    everything, data = load_calls(Path(request.calib)), request.data
    if data is None:
        test, calibration = everything.split(_TEST_SHARE, request.seed)
        source = f"{request.calib} (held out: {test.num_generations} of "
        source += f"{everything.num_generations} generations)"
    else:
        calibration, test, source = everything, load_calls(Path(data)), data
        _refuse_overlap(calibration, test)
        _refuse_other_calls(calibration, test, data)
    return ClipSets(
        calibration=calibration.spread(request.num_clips),
        test=test.spread(request.num_test_clips or NUM_TEST_CLIPS),
        test_source=source,
        skipped=(),
    )


def _refuse_other_calls(calibration: Calls, test: Calls, data: str) -> None:
    ours, theirs = calibration.rows[0].call.spec, test.rows[0].call.spec
    if (calibration.module_class, ours) != (test.module_class, theirs):
        message = (
            f"{data}: test calls must be of the same model and size as those of --calib, "
            f"{calibration.module_class} with {ours}; got {test.module_class} with {theirs}"
        )
        raise InputError(message)


def _refuse_overlap(calibration: Samples, test: Samples) -> None:
    if calibration.digest == test.digest:
        message = (
            "--data and --calib are the same clips: a model that is judged on its calibration "
            "clips proves nothing; name other test clips, or leave --data out to hold some back"
        )
        raise InputError(message)
