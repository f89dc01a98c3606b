"""PenVideo-20: real handwriting motion, rendered as the tip of a moving pen.

What: 20 classes, a digit drawn forward or backward in time. No single frame carries the label,
so a model has to use motion.
Source: "Pen-Based Recognition of Handwritten Digits" (UCI, CC BY 4.0), 10,992 recorded pen
movements of eight (x, y) points each, which ship in `assets/penvideo20.npz` (see NOTICE).
Clips are rendered on demand; the split is made by movement *before* time is reversed, so that no
movement is on both sides.

Shapes: N clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import numpy as np
import numpy.typing as npt

__all__ = ["LABELS", "NUM_FRAMES", "SIZE", "render", "split"]

NUM_FRAMES = 16
SIZE = 32
LABELS: tuple[str, ...] = tuple(
    f"{digit} {direction}" for direction in ("forward", "backward") for digit in range(10)
)
_PEN_RADIUS_PX = 1.3
_TRAIN_SHARE = 0.8
_SPLIT_SEED = 0


@lru_cache(maxsize=1)
def _trajectories() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    asset = resources.files("vcompress.models.reference") / "assets" / "penvideo20.npz"
    with asset.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        return archive["points"], archive["digits"]


def split(part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pen movements `[N, 8, 2]` in 0..100 and class indices `[N]` of `part` ("train" or "test").

    Every movement appears twice, forward (class = digit) and reversed (class = digit + 10):
    17,582 train and 4,402 test clips.
    """
    points, digits = _trajectories()
    generator = np.random.RandomState(_SPLIT_SEED)
    chosen: list[npt.NDArray[np.int64]] = []
    for digit in range(10):
        order = generator.permutation(np.flatnonzero(digits == digit))
        boundary = int(_TRAIN_SHARE * len(order))
        chosen.append(order[:boundary] if part == "train" else order[boundary:])
    index = np.concatenate(chosen)
    movements = np.concatenate([points[index], points[index][:, ::-1]])
    labels = np.concatenate([digits[index], digits[index] + 10]).astype(np.int64)
    return movements, labels


def render(movements: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Draw pen movements `[N, 8, 2]` as clips `[N, T=16, H=32, W=32, C=1]`, uint8.

    The pen moves at constant speed along each of the seven segments and leaves no trace.
    """
    position = np.linspace(0, 7, NUM_FRAMES)
    segment = np.minimum(position.astype(int), 6)
    fraction = (position - segment)[None, :, None]
    tip = movements[:, segment] * (1 - fraction) + movements[:, segment + 1] * fraction
    tip = tip / 100 * (SIZE - 9) + 4
    tip[..., 1] = SIZE - 1 - tip[..., 1]
    grid = np.arange(SIZE)
    dx = (grid[None, None, :] - tip[:, :, 0, None]) ** 2
    dy = (grid[None, None, :] - tip[:, :, 1, None]) ** 2
    distance = dy[:, :, :, None] + dx[:, :, None, :]
    ink = np.exp(-distance / (2 * _PEN_RADIUS_PX**2))
    clips: npt.NDArray[np.uint8] = (ink * 255).astype(np.uint8)[..., None]
    return clips
