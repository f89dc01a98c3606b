"""The gate: is the compressed model good enough to ship?

What: a paired non-inferiority test with three outcomes. A drop that is merely not significant is
no proof of quality, and a point drop below the bar on a few hundred clips is chance: it fails an
equal model as readily as it passes a worse one. So a pass needs the one-sided 95 % upper bound of
the drop at or below the bar (Bonett-Price interval, see `paired`); an observed drop above the bar
fails; what lies between is inconclusive, with the number of clips that would settle it.
Without labels every clip whose top-1 class changed counts as lost, the worst it could be. Outputs
that name no class are judged by SQNR, if a bar is set for it, and otherwise not at all.
A baseline that does no better than guessing has nothing to lose: no drop is a pass there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any, Literal

from vcompress.spec.errors import InputError
from vcompress.validate.guessing import why_guessing
from vcompress.validate.paired import PairedDrop, clips_needed, paired_drop

__all__ = ["Outcome", "Verdict", "judge", "with_generated"]

Outcome = Literal["pass", "fail", "inconclusive", "not judged"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of the gate and the numbers that it rests on.

    Attributes:
        outcome: "pass", "fail", "inconclusive" or "not judged".
        reason: one sentence for people.
        metric: "top1_drop", "top1_disagreement", "sqnr" or None.
        speed_ratio, speed_ratio_lower, speed_ratio_upper, min_speed_ratio: speed-up, its interval
            and the bar for it, where one was set; see `validate.speed`.
        drop_points: observed top-1 drop (or disagreement) in percentage points.
        drop_points_lower: its one-sided 95 % lower bound.
        drop_points_upper: its one-sided 95 % upper bound.
        max_drop_points: the bar for it.
        sqnr_db: observed SQNR in dB; None also where the outputs are identical.
        min_sqnr_db: the bar for it.
        num_clips: clips that were compared.
        clips_needed: clips like these with which, were the true rates the observed ones, the
            upper bound would fall below the bar with 80 % chance; None where the matter is
            settled, or where the drop lies too near to the bar.
    """

    outcome: Outcome
    reason: str
    metric: Literal["top1_drop", "top1_disagreement", "sqnr"] | None = None
    drop_points: float | None = None
    drop_points_lower: float | None = None
    drop_points_upper: float | None = None
    max_drop_points: float | None = None
    sqnr_db: float | None = None
    min_sqnr_db: float | None = None
    num_clips: int | None = None
    clips_needed: int | None = None
    speed_ratio: float | None = None
    speed_ratio_lower: float | None = None
    speed_ratio_upper: float | None = None
    min_speed_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


def judge(
    metrics: Mapping[str, float | int | None] | None,
    *,
    max_drop_points: float | None,
    min_sqnr_db: float | None = None,
) -> Verdict:
    """Judge the metrics that `compare_outputs` gave for the result.

    A classifier is held to `max_drop_points`, any model to `min_sqnr_db` where that is given; the
    worse of the two outcomes counts.

    Args:
        metrics: of the result against the baseline, or None where nothing could be compared.
        max_drop_points: the largest top-1 drop, in percentage points, that may ship; None for no
            bar.
        min_sqnr_db: the smallest SQNR, in dB, that may ship; None for no bar.

    Raises:
        InputError: a bar that no result could be held to.
    """
    if max_drop_points is not None and not 0 <= max_drop_points <= 100:
        message = f"the largest drop must be 0 to 100 points, got {max_drop_points}"
        raise InputError(message)
    if metrics is None:
        return Verdict(outcome="not judged", reason="No clips were compared.")
    fidelity = None if min_sqnr_db is None else _judge_sqnr(metrics, min_sqnr_db)
    if "num_disagreements" not in metrics:
        if fidelity is not None:
            return fidelity
        reason = (
            "A drop in points needs a classifier, and no bar is set for the SQNR, which is what "
            "these outputs can be held to."
            if max_drop_points is not None
            else "No bar is set."
        )
        return _not_judged(metrics, reason)
    if max_drop_points is None:
        return fidelity or _not_judged(metrics, "No bar is set.")
    accuracy = _judge_drop(metrics, max_drop_points)
    if fidelity is not None and fidelity.outcome == "fail" and accuracy.outcome != "fail":
        return fidelity
    return accuracy


def with_generated(verdict: Verdict, psnr_db: Sequence[float], bar_db: float) -> Verdict:
    """`verdict` with a bar for generated clips beside it; the worse outcome counts.

    Args:
        verdict: of single calls.
        psnr_db: of each held-out clip that the whole denoising run gives, against the full model.
        bar_db: for their mean.
    """
    reached = mean(psnr_db)
    good = reached >= bar_db
    reason = (
        f"PSNR {reached:.1f} dB on {len(psnr_db)} generated clips "
        f"{'reaches' if good else 'misses'} the bar of {bar_db:g} dB."
    )
    if verdict.outcome == "not judged":
        return replace(verdict, outcome="pass" if good else "fail", reason=reason)
    outcome = verdict.outcome if good else "fail"
    return replace(verdict, outcome=outcome, reason=f"{verdict.reason} {reason}")


def _not_judged(metrics: Mapping[str, float | int | None], reason: str) -> Verdict:
    return Verdict(outcome="not judged", reason=reason, num_clips=_count(metrics, "num_clips"))


def _count(metrics: Mapping[str, float | int | None], key: str) -> int:
    value = metrics[key]
    assert value is not None, f"{key} is a count and never None"
    return int(value)


def _judge_sqnr(metrics: Mapping[str, float | int | None], bar_db: float) -> Verdict:
    observed = metrics["sqnr_db"]
    identical = bool(metrics["identical"])
    good = identical or (observed is not None and observed >= bar_db)
    if identical:
        reason = "The outputs are identical."
    elif observed is None:
        reason = "The baseline's outputs are all zero, the result's are not."
    else:
        word = "reaches" if good else "misses"
        reason = f"SQNR {observed:.1f} dB {word} the bar of {bar_db:g} dB."
    return Verdict(
        outcome="pass" if good else "fail",
        reason=reason,
        metric="sqnr",
        sqnr_db=observed,
        min_sqnr_db=bar_db,
        num_clips=_count(metrics, "num_clips"),
    )


def _judge_drop(metrics: Mapping[str, float | int | None], bar: float) -> Verdict:
    labelled = metrics["num_right_to_wrong"] is not None
    drop = paired_drop(
        num_clips=_count(metrics, "num_clips"),
        num_right_to_wrong=_count(
            metrics, "num_right_to_wrong" if labelled else "num_disagreements"
        ),
        num_wrong_to_right=_count(metrics, "num_wrong_to_right") if labelled else 0,
    )
    outcome: Outcome = "inconclusive"
    if drop.drop_points > bar:
        outcome = "fail"
    elif drop.upper_points <= bar:
        outcome = "pass"
    guessed = "" if outcome == "fail" else _guessed(metrics)
    if guessed:
        outcome = "inconclusive"
    # A miss that the interval does not establish is a fail too, but more clips could overturn it.
    settled = outcome == "pass" or drop.lower_points > bar
    needed = None if settled or guessed else _needed(drop, bar)
    return Verdict(
        outcome=outcome,
        reason=guessed or _reason(drop, bar, outcome, needed, labelled=labelled),
        metric="top1_drop" if labelled else "top1_disagreement",
        drop_points=drop.drop_points,
        drop_points_lower=drop.lower_points,
        drop_points_upper=drop.upper_points,
        max_drop_points=bar,
        num_clips=drop.num_clips,
        clips_needed=needed,
    )


def _guessed(metrics: Mapping[str, float | int | None]) -> str:
    """Why a drop says nothing, if the baseline is right no more often than a guesser is."""
    percent, num_clips = metrics.get("baseline_top1_percent"), _count(metrics, "num_clips")
    if percent is None:
        return ""
    reason = why_guessing(
        num_right=round(num_clips * percent / 100), num_clips=num_clips,
        num_classes=_count(metrics, "num_classes"),
    )  # fmt: skip
    return f"{reason} A drop of top-1 says nothing here." if reason else ""


def _needed(drop: PairedDrop, bar: float) -> int | None:
    count = clips_needed(
        disagreement=drop.disagreement, drop_points=drop.drop_points, max_drop_points=bar
    )
    return None if count is None else max(count, drop.num_clips + 1)


def _reason(
    drop: PairedDrop, bar: float, outcome: Outcome, needed: int | None, *, labelled: bool
) -> str:
    what = "Top-1 drop" if labelled else "Top-1 disagreement (no labels: counted as lost)"
    seen = f"{what} {drop.drop_points:.2f} pt on {drop.num_clips:,} clips"
    if outcome == "pass":
        return f"{seen}; at most {drop.upper_points:.2f} pt with 95 % confidence, bar {bar:g} pt."
    if outcome == "fail":
        text = f"{seen} is above the bar of {bar:g} pt"
        if drop.lower_points <= bar:
            text += (
                f"; so few clips do not establish it (95 % bounds {drop.lower_points:.2f} to "
                f"{drop.upper_points:.2f} pt)"
            )
        return f"{text}."
    text = (
        f"{seen} meets the bar of {bar:g} pt, but it could be {drop.upper_points:.2f} pt with 95 % "
        "confidence"
    )
    if needed is None:
        return f"{text}; the drop is too near to the bar for more clips to help."
    return f"{text}; about {needed:,} clips would settle it."
