"""Which clips calibrate, and which test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vcompress.calib.clips import Clips
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.spec.clip import ClipSpec

SPEC = ClipSpec(num_frames=2, height=4, width=4, channels=1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clips.npz"
    frames = np.random.default_rng(0).integers(0, 255, (40, 2, 4, 4, 1), dtype=np.uint8)
    # Two clips alike, under two names.
    frames[39] = frames[0]
    np.savez(path, clips=frames, labels=np.arange(40) % 3)
    return str(path)


def sets(archive: str, num_clips: int, num_test_clips: int | None) -> tuple[Clips, Clips]:
    request = ClipRequest(
        calib=archive, data=None, num_clips=num_clips, num_test_clips=num_test_clips, seed=3
    )
    found = open_clip_sets(request, SPEC, ())
    assert isinstance(found.calibration, Clips)
    assert isinstance(found.test, Clips)
    return found.calibration, found.test


def test_as_many_clips_test_as_are_asked_for_and_the_same_ones_calibrate(archive: str) -> None:
    calibration, quarter = sets(archive, 12, None)
    assert (len(calibration), len(quarter)) == (12, 4)
    for asked, got in ((2, 2), (4, 4), (20, 20), (1000, None)):
        same, test = sets(archive, 12, asked)
        assert same.digest == calibration.digest
        assert len(test) == got or (got is None and len(test) in (27, 28))
        assert not set(test.names) & set(calibration.names)
        seen = {clip.tobytes() for clip in calibration.data}
        assert not [clip for clip in test.data if clip.tobytes() in seen]
        assert sets(archive, 12, asked)[1].digest == test.digest


def test_a_source_that_is_used_up_is_shared(archive: str) -> None:
    calibration, test = sets(archive, 64, 1000)
    assert (len(calibration), len(test)) == (30, 10)


def test_one_clip_calibrates_and_one_tests(tmp_path: Path, archive: str) -> None:
    calibration, test = sets(archive, 1, None)
    assert (len(calibration), len(test)) == (1, 1)
    np.savez(tmp_path / "two.npz", clips=np.arange(64, dtype=np.uint8).reshape(2, 2, 4, 4, 1))
    calibration, test = sets(str(tmp_path / "two.npz"), 64, 8)
    assert (len(calibration), len(test)) == (1, 1)
