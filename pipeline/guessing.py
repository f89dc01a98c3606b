"""Labels are looked at before anything is searched.

A bar for top-1 holds whatever is done to a model that is wrong from the start.
"""

from __future__ import annotations

import numpy as np

from vcompress.calib.calls import Samples
from vcompress.calib.clips import Clips
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Progress
from vcompress.validate.guessing import why_guessing

__all__ = ["warn_of_guessing"]

# Few, since the model runs on them once more; a model that knows its classes shows it on these.
_NUM_CLIPS = 32
_BATCH_SIZE = 8


def warn_of_guessing(model: VideoModel, clips: Samples, progress: Progress) -> None:
    """Warn if `model` names the labels of calibration clips no better than guessing does."""
    if model.task != "classify" or not isinstance(clips, Clips) or clips.labels is None:
        return
    some = clips.sample(_NUM_CLIPS, seed=0)  # they may lie in the order of their classes
    assert some.labels is not None, "a sample keeps its labels"
    with progress.stage("labels", len(some)) as advance:
        outputs = []
        for batch in some.tensors(_BATCH_SIZE):
            outputs.append(model(batch).float().numpy())
            advance(len(batch))
    scores = np.concatenate(outputs)
    if scores.ndim != 2 or max(some.labels) >= scores.shape[1]:
        return
    reason = why_guessing(
        num_right=int((scores.argmax(axis=1) == np.array(some.labels)).sum()),
        num_clips=len(some), num_classes=scores.shape[1],
    )  # fmt: skip
    if reason:
        progress.warn(f"{reason} Bars for top-1 say nothing until that is mended")
