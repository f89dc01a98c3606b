"""Do two forms of a classifier give the same answer for every clip?

What: the top class of each clip, by both forms. Rounding ties (see `parity`) do not stay small: a
value that is rounded the other way moves everything behind it by a little, and the next quantizers
turn little into whole steps wherever a value lies near a border. After a few blocks that is a part
of the quantization noise itself, and a clip that lies between two classes may get the other one, as
it may from one processor to the next. So a clip with two answers is looked at: the caller's
`is_tied` has to show that rounding ties are all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agreement", "check_agreement"]

_MAX_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two forms name the same class.

    Attributes:
        num_clips: that both were run on.
        num_differing: of them with two answers.
        num_looked_at: of those, at most 64, evenly spread.
        num_tied: of these, differences that rounding ties explain.
    """

    num_clips: int
    num_differing: int
    num_looked_at: int
    num_tied: int

    @property
    def verdict(self) -> Literal["pass", "ties", "fail"]:
        """Pass where all answers are the same, ties where ties explain what differs."""
        if not self.num_differing:
            return "pass"
        return "ties" if self.num_tied == self.num_looked_at else "fail"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        same = self.num_clips - self.num_differing
        unexplained = self.num_looked_at - self.num_tied
        # What was not looked at counts as what was.
        share = unexplained / self.num_looked_at if self.num_looked_at else 0.0
        return {
            "verdict": self.verdict,
            "num_clips": self.num_clips,
            "num_differing": self.num_differing,
            "num_looked_at": self.num_looked_at,
            "num_tied": self.num_tied,
            "agreement_percent": 100 * same / self.num_clips,
            "agreement_ties_shown_percent": 100 * (1 - share * self.num_differing / self.num_clips),
        }


def check_agreement(
    reference: NDArray[Any], candidate: NDArray[Any], is_tied: Callable[[int], bool]
) -> Agreement:
    """Compare the answers of two forms.

    Args:
        reference: logits `[N, classes]` of the form that is believed.
        candidate: of the form under test.
        is_tied: called with the number of a clip with two answers; whether ties explain them.
    """
    differing = np.flatnonzero(reference.argmax(-1) != candidate.argmax(-1))
    looked_at = _spread(differing.tolist())
    return Agreement(
        num_clips=len(reference),
        num_differing=len(differing),
        num_looked_at=len(looked_at),
        num_tied=sum(is_tied(number) for number in looked_at),
    )


def _spread(numbers: Sequence[int]) -> list[int]:
    count = min(_MAX_SHOWN, len(numbers))
    return [numbers[index * len(numbers) // count] for index in range(count)]
