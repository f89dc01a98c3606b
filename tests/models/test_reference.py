"""The recognisers that ship: trained, with clips that calibration and test do not share."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch

from vcompress.calib.clips import Clips
from vcompress.models.load import load_model
from vcompress.models.reference import moving_fashion
from vcompress.models.reference.catalog import reference_clips

# Well below what the full test set gives (see the README), well above chance.
FLOORS = {"penvideo20": (90.0, 5.0), "moving-fashion": (55.0, 1.25)}


@pytest.mark.parametrize("name", list(FLOORS))
def test_it_recognises_clips_that_it_never_saw(name: str) -> None:
    model = load_model(f"reference:{name}")
    frames, labels, names = reference_clips(name, "test", limit=200)
    clips = Clips.from_frames(frames, model.clip, labels=labels, names=names)
    outputs = torch.cat([model(torch.from_numpy(batch)) for batch in clips.batches(50)])
    assert outputs.shape == (200, len(model.labels))
    top1 = 100 * float((outputs.argmax(-1).numpy() == labels).mean())
    floor, chance = FLOORS[name]
    assert top1 > floor > 5 * chance


def test_parts_share_no_garment_and_no_background() -> None:
    parts = [moving_fashion.split(part).images for part in ("calibration", "test")]
    seen = {image.tobytes() for image in parts[0]}
    assert not any(image.tobytes() in seen for image in parts[1])
    frames = [
        {frame.tobytes() for video in moving_fashion.shipped_backgrounds(part) for frame in video}
        for part in ("calibration", "test")
    ]
    assert not frames[0] & frames[1]


def test_a_garment_moves_where_its_label_says() -> None:
    garments = moving_fashion.split("test")
    few = moving_fashion.Garments(images=garments.images[:40], kinds=garments.kinds[:40])
    black = [np.zeros((16, 64, 64, 3), np.uint8)]
    clips, labels = moving_fashion.compose(few, black, seed=3)
    assert (labels // 8 == few.kinds).all()
    rows, columns = np.mgrid[:64, :64]
    for clip, label in zip(clips, labels, strict=True):
        light = clip.sum(-1, dtype=np.float64)
        centres = [
            ((frame * rows).sum() / frame.sum(), (frame * columns).sum() / frame.sum())
            for frame in (light[0], light[-1])
        ]
        moved = np.subtract(centres[1], centres[0])
        angle = np.arctan2(moved[0], moved[1]) % (2 * np.pi)
        difference = abs(angle - label % 8 * np.pi / 4)
        assert min(difference, 2 * np.pi - difference) < 0.1


def test_assets_are_small() -> None:
    assets = resources.files("vcompress.models.reference") / "assets"
    for asset in assets.iterdir():
        assert len(asset.read_bytes()) < 20e6
