"""Labels in another order than the model's classes are noticed before anything is searched."""

from __future__ import annotations

from dataclasses import replace

from vcompress.calib.sources import open_clips
from vcompress.models.load import LoadOptions, load_model
from vcompress.pipeline.guessing import warn_of_guessing
from vcompress.pipeline.run import Recorded, Silent


def test_shuffled_classes_are_noticed_and_right_ones_are_not() -> None:
    model = load_model("reference:penvideo20", LoadOptions())
    clips = open_clips(
        "reference:penvideo20", model.clip, part="test", limit=48, seed=3, labels=model.labels
    )
    assert clips.labels is not None
    progress = Recorded(Silent())
    warn_of_guessing(model, clips, progress)
    assert progress.warnings == []
    # The folder that comes first in the alphabet is another class than the model's first.
    others = replace(clips, labels=tuple((label + 10) % 20 for label in clips.labels))
    warn_of_guessing(model, others, progress)
    (warning,) = progress.warnings
    assert "of 32 clips, which guessing among 20 classes reaches too" in warning
    warn_of_guessing(model, replace(clips, labels=None), progress)
    assert len(progress.warnings) == 1
