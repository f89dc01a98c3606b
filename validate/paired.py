"""How many points of top-1 were lost, with bounds, on clips that both models saw.

What: the Bonett-Price adjusted Wald interval for the difference of two paired proportions
(Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
based on paired data", Journal of Educational and Behavioral Statistics 37(4), 2012), one-sided
at 95 %, and the sample size of a paired non-inferiority test.
What we changed: where the models never differ, the bound is the exact binomial one
(1 - 0.05^(1/n), the "rule of three"), which is the wider of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from vcompress.spec.errors import InputError

__all__ = ["PairedDrop", "clips_needed", "paired_drop"]

_ALPHA = 0.05
_Z_ALPHA = NormalDist().inv_cdf(1 - _ALPHA)
# Beyond this a number of clips is no advice any more.
_MAX_CLIPS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class PairedDrop:
    """Top-1 lost between two models on the same clips; positive means that the candidate is worse.

    Attributes:
        num_clips: clips that both models classified.
        num_right_to_wrong: clips that only the baseline got right.
        num_wrong_to_right: clips that only the candidate got right.
        drop_points: the observed drop, in percentage points.
        lower_points: one-sided 95 % lower bound of the drop.
        upper_points: one-sided 95 % upper bound of the drop.
    """

    num_clips: int
    num_right_to_wrong: int
    num_wrong_to_right: int
    drop_points: float
    lower_points: float
    upper_points: float

    @property
    def disagreement(self) -> float:
        """Share of clips, in [0, 1], that exactly one of the models got right."""
        return (self.num_right_to_wrong + self.num_wrong_to_right) / self.num_clips


def paired_drop(*, num_clips: int, num_right_to_wrong: int, num_wrong_to_right: int) -> PairedDrop:
    """The drop and its one-sided 95 % bounds from the counts of a paired comparison.

    Raises:
        InputError: no clips, or counts that cannot belong to `num_clips` clips.
    """
    lost, won = num_right_to_wrong, num_wrong_to_right
    if num_clips < 1 or lost < 0 or won < 0 or lost + won > num_clips:
        message = (
            "a paired comparison needs at least one clip and no more changed clips than clips; "
            f"got {num_clips} clips, {lost} right to wrong, {won} wrong to right"
        )
        raise InputError(message)
    if lost + won == 0:
        centre, reach = 0.0, 1 - _ALPHA ** (1 / num_clips)
    else:
        p, q = (lost + 1) / (num_clips + 2), (won + 1) / (num_clips + 2)
        centre = p - q
        reach = _Z_ALPHA * math.sqrt((p + q - (p - q) ** 2) / (num_clips + 2))
    return PairedDrop(
        num_clips=num_clips,
        num_right_to_wrong=lost,
        num_wrong_to_right=won,
        drop_points=100 * (lost - won) / num_clips,
        lower_points=100 * max(-1.0, centre - reach),
        upper_points=100 * min(1.0, centre + reach),
    )


def clips_needed(
    *, disagreement: float, drop_points: float, max_drop_points: float, power: float = 0.8
) -> int | None:
    """Clips with which the upper bound of the drop falls below the bar with chance `power`.

    Args:
        disagreement: share of clips, in [0, 1], that exactly one of the models gets right.
        drop_points: the true drop that is assumed; a gain counts as no drop.
        max_drop_points: the bar.
        power: chance in (0, 1) that the test ends in a pass.

    Returns:
        The number of clips, or None where the assumed drop lies at the bar or so near to it that
        no practical number of clips would do.
    """
    drop, margin = max(0.0, drop_points) / 100, max_drop_points / 100
    if drop >= margin:
        return None
    if margin >= 1:
        return 1
    if disagreement <= 0:
        # Without a single difference the bound is 1 - alpha^(1/n).
        return math.ceil(math.log(_ALPHA) / math.log1p(-margin))
    z = _Z_ALPHA + NormalDist().inv_cdf(power)
    count = math.ceil(z**2 * max(0.0, disagreement - drop**2) / (margin - drop) ** 2)
    return count if count <= _MAX_CLIPS else None
