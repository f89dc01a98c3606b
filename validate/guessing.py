"""Whether a classifier answers better than guessing does, on the labels that it is judged by.

What: the exact one-sided binomial test (Clopper and Pearson, "The use of confidence or fiducial
limits illustrated in the case of the binomial", Biometrika 26, 1934) against a guesser that names
each of the classes equally often. A model that fails it was given other classes, or clips that are
prepared otherwise than those of its training: nothing can be lost there, and a drop of 0 points
proves nothing.
"""

from __future__ import annotations

import math

__all__ = ["answers_like_guessing", "why_guessing"]

_ALPHA = 0.05


def answers_like_guessing(*, num_right: int, num_clips: int, num_classes: int) -> bool:
    """Whether guessing is as often right in more than 5 of 100 such tests.

    Args:
        num_right: clips whose class the model names.
        num_clips: clips, at least `num_right`.
        num_classes: that it chooses from; of a single one there is nothing to guess.
    """
    if num_classes < 2:
        return False
    win, lose = math.log(1 / num_classes), math.log(1 - 1 / num_classes)
    tail = math.fsum(
        math.exp(
            math.lgamma(num_clips + 1) - math.lgamma(right + 1) - math.lgamma(num_clips - right + 1)
            + right * win + (num_clips - right) * lose
        )
        for right in range(num_right, num_clips + 1)
    )  # fmt: skip
    return tail > _ALPHA


def why_guessing(*, num_right: int, num_clips: int, num_classes: int) -> str:
    """What to look at, for people, if the model answers like guessing; "" if it does not."""
    if not answers_like_guessing(num_right=num_right, num_clips=num_clips, num_classes=num_classes):
        return ""
    return (
        f"The model itself is right on {num_right:,} of {num_clips:,} clips, which guessing among "
        f"{num_classes:,} classes reaches too: the labels are not its classes (folders are taken "
        "in alphabetical order, unless the model's config has an id2label that names its classes), "
        "or clips are prepared otherwise than in its training (--mean, --std, --fps, "
        "--clip-stride)."
    )
