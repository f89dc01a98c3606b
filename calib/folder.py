"""Finding the videos in a folder, whatever else lies there.

Only regular files with the suffix of a video are taken, in the order of their names. Links to
folders are not followed, so that a loop cannot trap the walk; links to files are. What is passed
over although it looks like a video is reported with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vcompress.calib.sniff import VIDEO_SUFFIXES, printable
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = ["Found", "class_indices", "find_videos"]

_MAX_ENTRIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a folder holds.

    Attributes:
        videos: paths relative to the folder, sorted by their parts.
        skipped: (relative name, reason) of what was passed over although it looks like a video.
    """

    videos: tuple[Path, ...]
    skipped: tuple[tuple[str, str], ...]


def find_videos(folder: Path) -> Found:
    """All videos below `folder`; hidden files and folders are ignored.

    Raises:
        InputError: the folder holds more than a million entries, or no video.
    """
    videos: list[Path] = []
    skipped: list[tuple[str, str]] = []
    num_others = 0
    num_entries = 0
    pending = [Path()]
    while pending:
        relative = pending.pop()
        try:
            with os.scandir(folder / relative) as entries:
                for entry in entries:
                    num_entries += 1
                    _check_count(folder, num_entries)
                    if entry.name.startswith("."):
                        continue
                    child = relative / entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(child)
                    elif entry.is_dir():
                        skipped.append((printable(child), "a link to a folder is not followed"))
                    elif child.suffix.lower() not in VIDEO_SUFFIXES:
                        num_others += 1
                    elif entry.is_file():
                        videos.append(child)
                    else:
                        skipped.append((printable(child), "not a regular file"))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            skipped.append((printable(relative), reason))
    if not videos:
        raise InputError(_nothing_found(folder, num_others, sorted(skipped)))
    videos.sort(key=lambda path: path.parts)
    return Found(videos=tuple(videos), skipped=tuple(sorted(skipped)))


def class_indices(
    videos: Sequence[Path], label_names: Sequence[str] | None
) -> tuple[int, ...] | None:
    """The class of each video: the first folder of its path, or None if one lies in no folder.

    With `label_names` a class is the index of the folder's name in it, otherwise the index in
    the sorted names of the folders.

    Raises:
        InputError: a folder is none of `label_names`.
    """
    if any(len(path.parts) < 2 for path in videos):
        return None
    classes = [path.parts[0] for path in videos]
    known = sorted(set(classes)) if label_names is None else list(label_names)
    index = {name: position for position, name in enumerate(known)}
    unknown = [name for name in dict.fromkeys(classes) if name not in index]
    if unknown:
        message = (
            f"the folder {printable(unknown[0])!r} is not a class of the model"
            f"{nearest(unknown[0], known)}; name the folders after the model's {len(known)} "
            "classes, or put the videos into one folder if their classes do not matter"
        )
        raise InputError(message)
    return tuple(index[name] for name in classes)


def _check_count(folder: Path, num_entries: int) -> None:
    if num_entries > _MAX_ENTRIES:
        message = (
            f"{printable(folder)} holds more than {_MAX_ENTRIES} entries; give a smaller folder"
        )
        raise InputError(message)


def _nothing_found(folder: Path, num_others: int, skipped: Sequence[tuple[str, str]]) -> str:
    found = f"{num_others} other files" if num_others else "nothing else"
    if skipped:
        found += ", " + "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return (
        f"{printable(folder)} must hold at least one video, found none ({found}); "
        f"a video ends in one of {' '.join(VIDEO_SUFFIXES)}"
    )
