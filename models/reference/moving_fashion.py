"""Moving Fashion: real garments that move over real video, 80 classes.

What: 16 frames of 64x64 RGB; the class is the garment (10) and its direction of motion (8). The
background moves too, so that a recogniser has to tell the object's motion from the camera's.
Source: Fashion-MNIST photographs (Xiao et al., 2017, arXiv:1708.07747, MIT) over frames of
OpenCV's sample videos (Apache-2.0), at half of their brightness; see NOTICE. A part of the official
test garments and the background frames ship in `assets/moving_fashion.npz`. No background of the
test set occurs in training, and calibration uses training garments and a training background.

Shapes: N clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
import numpy.typing as npt

__all__ = [
    "BACKGROUND_GAIN", "DIRECTIONS", "GARMENTS", "GARMENT_SIZE", "LABELS", "NUM_FRAMES", "SIZE",
    "Garments", "compose", "shipped_backgrounds", "split",
]  # fmt: skip

NUM_FRAMES = 16
SIZE = 64
GARMENT_SIZE = 28
GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIRECTIONS = ("E", "SE", "S", "SW", "W", "NW", "N", "NE")
LABELS: tuple[str, ...] = tuple(f"{g} {d}" for g in GARMENTS for d in DIRECTIONS)
_TRAVEL_PX = (18.0, 33.0)  # over the clip: 1.2 to 2.2 pixels a frame
# Garments are photographs on black, many of them dark: before a bright wall a recogniser of this
# size and training took nearly all of them for something else.
BACKGROUND_GAIN = 0.5
_PAUSE_FRAMES, _GRID_PX = 4, 8


@dataclass(frozen=True, kw_only=True)
class Garments:
    """Photographs `images` `[N, 28, 28]` uint8 and their kind `kinds` `[N]`, 0..9."""

    images: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def _asset() -> dict[str, npt.NDArray[np.uint8]]:
    asset = resources.files("vcompress.models.reference") / "assets" / "moving_fashion.npz"
    with asset.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def split(part: str) -> Garments:
    """The shipped garments of `part`: "calibration" (official train) or "test" (official test)."""
    asset = _asset()
    return Garments(images=asset[f"{part}_images"], kinds=asset[f"{part}_kinds"])


def shipped_backgrounds(part: str) -> list[npt.NDArray[np.uint8]]:
    """Background videos `[frames, H >= 64, W >= 64, 3]` for `part` ("calibration" or "test")."""
    prefix = f"{part}_background_"
    asset = _asset()
    return [asset[name] for name in sorted(asset) if name.startswith(prefix)]


def compose(
    garments: Garments,
    backgrounds: list[npt.NDArray[np.uint8]],
    *,
    seed: int,
    windows: npt.NDArray[np.uint8] | None = None,
    freedoms: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Render one clip a garment: clips `[N, T=16, H=64, W=64, C=3]` uint8 and labels `[N]`.

    Direction, speed, start, tint and background window are drawn from `seed`. `windows`
    `[N, T, H, W, C]`, if given, are the backgrounds instead; all else stays as it is. `freedoms`
    `[N]`, if given, hold each garment on a grid more or less; see `_held`.
    """
    generator = np.random.default_rng(seed)
    clips = np.empty((len(garments.images), NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(len(garments.images), np.int64)
    for n, (image, kind) in enumerate(zip(garments.images, garments.kinds, strict=True)):
        direction = int(generator.integers(8))
        window = _background_window(backgrounds, generator)
        clips[n] = window if windows is None else windows[n]
        path = _path(direction, generator)
        if freedoms is not None:
            path = _held(path, float(freedoms[n]))
        corners = np.rint(path).astype(np.int64)
        _paste(clips[n], image, corners, generator.uniform(0.6, 1.0, 3))
        labels[n] = int(kind) * 8 + direction
    return clips, labels


def _background_window(
    backgrounds: list[npt.NDArray[np.uint8]], generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    video = backgrounds[int(generator.integers(len(backgrounds)))]
    first = int(generator.integers(video.shape[0] - NUM_FRAMES + 1))
    top = int(generator.integers(video.shape[1] - SIZE + 1))
    left = int(generator.integers(video.shape[2] - SIZE + 1))
    window = video[first : first + NUM_FRAMES, top : top + SIZE, left : left + SIZE]
    return (window * BACKGROUND_GAIN).astype(np.uint8)


def _path(direction: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Top-left corners `[T, 2]` (y, x), inside the frame, moving along `direction` * 45 degrees."""
    angle = direction * np.pi / 4
    unit = np.array([np.sin(angle), np.cos(angle)])  # image y points down, so S is +y
    room = SIZE - GARMENT_SIZE
    travel = generator.uniform(*_TRAVEL_PX) * unit
    low, high = np.maximum(0, -travel), room - np.maximum(0, travel)
    start = generator.uniform(low, high)
    steps = np.linspace(0, 1, NUM_FRAMES)[:, None]
    path: npt.NDArray[np.float64] = start + steps * travel
    return path


def _held(path: npt.NDArray[np.float64], freedom: float) -> npt.NDArray[np.float64]:
    """`path` `[T, 2]`, more or less in jumps.

    At freedom 0 the garment stands still for four frames and stands on a grid of 8 pixels; at 1
    the path is as it was; between, it moves a part of its way and the grid is that much finer.
    """
    if freedom >= 1:
        return path
    pauses = path.reshape(-1, _PAUSE_FRAMES, 2)
    middle = pauses.mean(1, keepdims=True)
    loose = (middle + freedom * (pauses - middle)).reshape(path.shape)
    grid = max(1.0, _GRID_PX * (1 - freedom))
    room = SIZE - GARMENT_SIZE
    held: npt.NDArray[np.float64] = np.clip(np.rint(loose / grid) * grid, 0, room)
    return held


def _paste(
    clip: npt.NDArray[np.uint8],
    image: npt.NDArray[np.uint8],
    path: npt.NDArray[np.int64],
    tint: npt.NDArray[np.float64],
) -> None:
    opacity = np.minimum(image.astype(np.float32) / 48, 1)[..., None]
    colour = image.astype(np.float32)[..., None] * tint.astype(np.float32)
    for frame, (y, x) in zip(clip, path, strict=True):
        patch = frame[y : y + GARMENT_SIZE, x : x + GARMENT_SIZE]
        patch[...] = (colour * opacity + patch * (1 - opacity)).astype(np.uint8)
