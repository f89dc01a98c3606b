"""Clips from whatever a user has: a folder, a video, an archive or Python objects."""

from __future__ import annotations

import operator
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vcompress.calib.archives import check_bytes, read_npz, read_pt, tensor_to_array
from vcompress.calib.clips import Clips, permutation
from vcompress.calib.decode import read_frames
from vcompress.calib.folder import class_indices, find_videos
from vcompress.calib.sniff import printable
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["ClipSource", "load_clips"]

ClipSource = str | os.PathLike[str] | Clips | npt.NDArray[Any] | torch.Tensor | Iterable[Any]

_ARCHIVES = {".npz": read_npz, ".pt": read_pt, ".pth": read_pt}
_ACCEPTED = (
    "give a folder of videos, a video, an .npz or .pt file, an array or an iterable of clips"
)


def load_clips(
    source: ClipSource,
    spec: ClipSpec,
    *,
    limit: int | None = None,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
) -> Clips:
    """Read clips for the model input that `spec` describes.

    `source` is one of
      - a folder: all videos below it, sorted by name. If all of them lie in sub-folders, the
        first folder of a path is the label. A video that cannot be read is put into
        `Clips.skipped` with the reason.
      - a video file.
      - an `.npz` file, or a `.pt` file from torch.save, with `clips` and, where known, `labels`
        and `names`: clips are uint8 frames `[N, T, H, W, C]` or `[N, *spec.input_shape]` of
        `spec.dtype`. Objects in the files are never loaded. A `.pt` file may be the tensor alone.
      - an array or a tensor of the same shapes.
      - an iterable of single clips (arrays or tensors) or of (clip, label) pairs.

    Args:
        source: where the clips come from.
        spec: how frames become an input.
        limit: use at most so many clips, at least 1. Of a folder, an archive or an array they are
            drawn at random with `seed`, and stay in the order drawn; of an iterable the first.
        seed: for `limit`.
        label_names: the classes of the model. Folder names are looked up in it, and labels must
            be indices into it; without it the sorted folder names are the classes.

    Raises:
        InputError: nothing there, no readable clip, or clips that do not fit `spec`.
        MissingCapabilityError: `source` is a video and PyAV is not installed.
    """
    if limit is not None and limit < 1:
        message = f"the number of clips must be at least 1, got {limit}"
        raise InputError(message)
    if isinstance(source, Clips):
        clips = source
    elif isinstance(source, str | os.PathLike):
        clips = _from_path(Path(source), spec, limit, seed, label_names)
    elif isinstance(source, np.ndarray | torch.Tensor):
        clips = Clips.from_array(_as_array(source, "the clips"), spec)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        clips = _from_iterable(source, spec, limit, label_names)
    else:
        message = f"clips cannot be read from a {type(source).__name__}; {_ACCEPTED}"
        raise InputError(message)
    if limit is None or len(clips) <= limit:
        return clips
    return replace(clips.sample(limit, seed), skipped=clips.skipped)


def _from_path(
    path: Path,
    spec: ClipSpec,
    limit: int | None,
    seed: int,
    label_names: Sequence[str] | None,
) -> Clips:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"cannot find the clips {printable(path)} ({reason}); {_ACCEPTED}"
        raise InputError(message) from error
    if stat.S_ISDIR(mode):
        return _from_folder(path, spec, limit, seed, label_names)
    if not stat.S_ISREG(mode):
        message = f"{printable(path)} is neither a file nor a folder; {_ACCEPTED}"
        raise InputError(message)
    read = _ARCHIVES.get(path.suffix.lower())
    if read is None:
        return Clips.from_frames(read_frames(path, spec)[None], spec, names=[printable(path.name)])
    try:
        arrays = read(path)
        return Clips.from_array(
            arrays.clips, spec, labels=arrays.labels, names=arrays.names, label_names=label_names
        )
    except (InputError, OSError) as error:
        message = f"{printable(path)}: {error}"
        raise InputError(message) from error


def _from_folder(
    folder: Path,
    spec: ClipSpec,
    limit: int | None,
    seed: int,
    label_names: Sequence[str] | None,
) -> Clips:
    found = find_videos(folder)
    labels = class_indices(found.videos, label_names)
    count = len(found.videos)
    capacity = count if limit is None else min(limit, count)
    shape = (capacity, spec.num_frames, spec.height, spec.width, spec.channels)
    check_bytes(int(np.prod(shape, dtype=object)), f"the {capacity} clips in {printable(folder)}")
    frames = np.empty(shape, np.uint8)
    used: list[int] = []
    skipped = list(found.skipped)
    for index in range(count) if capacity == count else permutation(count, seed):
        path = folder / found.videos[index]
        try:
            frames[len(used)] = read_frames(path, spec)
            used.append(index)
        except InputError as error:
            reason = str(error).removeprefix(f"{printable(path)}: ")
            skipped.append((printable(found.videos[index]), reason))
        if len(used) == capacity:
            break
    if not used:
        first = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        message = (
            f"{printable(folder)} must hold at least one readable video; none of {count} could be "
            f"read: {first}"
        )
        raise InputError(message)
    return Clips.from_array(
        frames[: len(used)],
        spec,
        labels=None if labels is None else [labels[index] for index in used],
        names=[printable(found.videos[index].as_posix()) for index in used],
        skipped=tuple(skipped),
    )


def _from_iterable(
    source: Iterable[Any],
    spec: ClipSpec,
    limit: int | None,
    label_names: Sequence[str] | None,
) -> Clips:
    arrays: list[npt.NDArray[Any]] = []
    labels: list[int] = []
    num_bytes = 0
    for position, item in enumerate(islice(source, limit)):
        clip, label = _clip_and_label(item, position)
        if position == 0:
            # Says at once what is wrong with the shape.
            Clips.from_array(np.zeros_like(clip[None]), spec)
        elif clip.shape != arrays[0].shape or clip.dtype != arrays[0].dtype:
            message = (
                f"clips must be alike: clip 0 is {arrays[0].dtype} of shape "
                f"{list(arrays[0].shape)}, clip {position} is {clip.dtype} of {list(clip.shape)}"
            )
            raise InputError(message)
        num_bytes += clip.nbytes
        check_bytes(num_bytes, "the clips")
        arrays.append(clip)
        labels += [] if label is None else [label]
    if not arrays:
        message = f"the {type(source).__name__} of clips must give at least one, gave none"
        raise InputError(message)
    if labels and len(labels) != len(arrays):
        message = f"labels: either every clip has one or none, got {len(labels)} of {len(arrays)}"
        raise InputError(message)
    return Clips.from_array(np.stack(arrays), spec, labels=labels or None, label_names=label_names)


def _clip_and_label(item: Any, position: int) -> tuple[npt.NDArray[Any], int | None]:
    if not isinstance(item, tuple | list):
        return _as_array(item, f"clip {position}"), None
    if len(item) != 2:
        message = f"clip {position} must be a clip or a (clip, label) pair, got {len(item)} items"
        raise InputError(message)
    try:
        label = operator.index(item[1])
    except TypeError as error:
        message = f"the label of clip {position} must be an integer, got {type(item[1]).__name__}"
        raise InputError(message) from error
    return _as_array(item[0], f"clip {position}"), label


def _as_array(value: Any, what: str) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        return tensor_to_array(value)
    if isinstance(value, np.ndarray):
        return value
    message = f"{what} must be an array or a tensor, got {type(value).__name__}"
    raise InputError(message)
