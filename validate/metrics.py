"""What a candidate's outputs are worth against the baseline's, on the same clips.

Shapes: N clips, C classes; outputs are `[N, C]` for classifiers and `[N, ...]` otherwise.
Everything is computed in float64. A metric that is not defined for its data (a ratio to an output
of zeros, an accuracy without labels) is None, never a number that looks like one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vcompress.spec.errors import InputError, QualityGateError
from vcompress.validate.paired import paired_drop
from vcompress.validate.task_metrics import (
    detection_metrics,
    expected_calibration_error,
    video_metrics,
)

__all__ = [
    "Metrics", "Task", "agreement_percent", "compare_outputs", "cosine_per_clip",
    "kl_nats_per_clip", "relative_l2", "relative_l2_per_clip", "sqnr_db", "top_k_percent",
]  # fmt: skip

Task = Literal["classify", "embed", "detect", "denoise", "restore", "generic"]
Metrics = dict[str, float | int | None]
FloatArray = NDArray[np.float64]


class _Sums(NamedTuple):
    """Sums over everything but the clips, each `[N]`: b*b, c*c, b*c and (b-c)*(b-c)."""

    baseline: FloatArray
    candidate: FloatArray
    product: FloatArray
    error: FloatArray


def _sums(baseline: ArrayLike, candidate: ArrayLike) -> _Sums:
    b, c = np.asarray(baseline), np.asarray(candidate)
    if b.shape != c.shape:
        message = f"outputs must have the same shape, got {b.shape} and {c.shape}"
        raise InputError(message)
    rows = np.empty((4, len(b)), dtype=np.float64)
    # One clip at a time: a generator's clips in float64 would not fit into memory all at once.
    for index in range(len(b)):
        x = b[index].astype(np.float64).ravel()
        y = c[index].astype(np.float64).ravel()
        difference = x - y
        rows[:, index] = x @ x, y @ y, x @ y, difference @ difference
    return _Sums(*rows)


def _quotient(numerator: float, denominator: float) -> float:
    """`numerator / denominator` for sums of squares; 0/0 is no error at all."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator


def cosine_per_clip(baseline: ArrayLike, candidate: ArrayLike) -> FloatArray:
    """Cosine of the angle between the outputs of each clip, `[N]`.

    Two outputs of zeros count as 1 (they are equal), one output of zeros as 0.
    """
    return _cosine(_sums(baseline, candidate))


def _cosine(sums: _Sums) -> FloatArray:
    norms = np.sqrt(sums.baseline) * np.sqrt(sums.candidate)
    both_zero = (sums.baseline == 0) & (sums.candidate == 0)
    ratio = np.divide(sums.product, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.where(both_zero, 1.0, np.clip(ratio, -1.0, 1.0))


def sqnr_db(baseline: ArrayLike, candidate: ArrayLike) -> float:
    """Signal to quantization noise over all clips, `10 log10(sum b^2 / sum (b - c)^2)`, in dB.

    Returns:
        Infinity for equal outputs, minus infinity for a baseline of zeros and another candidate.
    """
    sums = _sums(baseline, candidate)
    return _decibels(_quotient(float(sums.error.sum()), float(sums.baseline.sum())))


def _decibels(noise_over_signal: float) -> float:
    if noise_over_signal == 0:
        return math.inf
    return -10 * math.log10(noise_over_signal)


def relative_l2(baseline: ArrayLike, candidate: ArrayLike) -> float:
    """`|b - c| / |b|` over all clips; infinity for a baseline of zeros and another candidate."""
    sums = _sums(baseline, candidate)
    return math.sqrt(_quotient(float(sums.error.sum()), float(sums.baseline.sum())))


def relative_l2_per_clip(baseline: ArrayLike, candidate: ArrayLike) -> FloatArray:
    """`|b - c| / |b|` of each clip, `[N]`."""
    return _relative_l2(_sums(baseline, candidate))


def _relative_l2(sums: _Sums) -> FloatArray:
    pairs = zip(sums.error, sums.baseline, strict=True)
    return np.array([math.sqrt(_quotient(float(e), float(b))) for e, b in pairs])


def _ranks(scores: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Classes that come before the label, `[N]`; of equal scores the lower index comes first."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = scores > own
    ties = (scores == own) & (np.arange(scores.shape[1])[None] < labels[:, None])
    return cast("NDArray[np.int64]", (before | ties).sum(axis=1))


def top_k_percent(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Clips, in percent, whose label is among the `k` highest of the scores `[N, C]`."""
    return 100 * float(np.mean(_ranks(np.asarray(scores), np.asarray(labels)) < k))


def agreement_percent(baseline: ArrayLike, candidate: ArrayLike) -> float:
    """Clips, in percent, for which both score arrays `[N, C]` name the same class first."""
    same = np.asarray(baseline).argmax(axis=1) == np.asarray(candidate).argmax(axis=1)
    return 100 * float(np.mean(same))


def _log_softmax(scores: ArrayLike) -> FloatArray:
    x = np.asarray(scores).astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return cast("FloatArray", x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def kl_nats_per_clip(baseline: ArrayLike, candidate: ArrayLike) -> FloatArray:
    """KL(softmax of baseline || softmax of candidate) in nats, `[N]`, from logits `[N, C]`."""
    p, q = _log_softmax(baseline), _log_softmax(candidate)
    # Rounding can leave -1e-17 for equal rows.
    return cast("FloatArray", np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _check_outputs(baseline: NDArray[Any], candidate: NDArray[Any], task: str) -> None:
    if task not in get_args(Task):
        message = f"task must be one of {', '.join(get_args(Task))}, got {task!r}"
        raise InputError(message)
    if baseline.shape != candidate.shape:
        message = (
            f"baseline and candidate must have outputs of the same shape, got {baseline.shape} "
            f"and {candidate.shape}; run both on the same clips"
        )
        raise InputError(message)
    if baseline.ndim < 1 or baseline.size == 0:
        message = f"outputs must be [N, ...] with at least one clip, got shape {baseline.shape}"
        raise InputError(message)
    if task == "classify" and (baseline.ndim != 2 or baseline.shape[1] < 2):
        message = (
            f"a classifier's outputs must be [N, C] with two classes or more, got "
            f"{baseline.shape}; compare other outputs with task generic"
        )
        raise InputError(message)
    _check_finite(baseline, "baseline", InputError, "leave the clip out or repair the model")
    _check_finite(
        candidate, "candidate", QualityGateError,
        "this misses every bar; keep more layers in float (format keep in the plan)",
    )  # fmt: skip


def _check_finite(outputs: NDArray[Any], who: str, error: type[Exception], remedy: str) -> None:
    finite = np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1)
    if finite.all():
        return
    broken = np.flatnonzero(~finite)
    message = (
        f"every output must be finite; the {who}'s output for clip {broken[0]} (counted from 0) "
        f"has NaN or infinite values ({len(broken)} of {len(outputs)} clips do); {remedy}"
    )
    raise error(message)


def _check_labels(labels: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    array = np.asarray(labels)
    if array.shape != shape[:1] or not np.issubdtype(array.dtype, np.integer):
        message = (
            f"labels must be {shape[0]} integers, one a clip, got shape {array.shape} of "
            f"{array.dtype}"
        )
        raise InputError(message)
    outside = np.flatnonzero((array < 0) | (array >= shape[1]))
    if outside.size:
        message = (
            f"labels must lie in 0..{shape[1] - 1}, as the model has {shape[1]} classes; clip "
            f"{outside[0]} (counted from 0) has label {array[outside[0]]}; use this model's labels"
        )
        raise InputError(message)
    return array.astype(np.int64)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def compare_outputs(
    baseline: ArrayLike, candidate: ArrayLike, *, labels: ArrayLike | None, task: str,
    layout: str | None = None,
) -> Metrics:  # fmt: skip
    """All metrics of `candidate` against `baseline` on the same clips, with units in the keys.

    The keys depend on the task only; what cannot be known is None. Every task has `num_clips`,
    `identical` (then `sqnr_db`, being infinite, is None), `cosine_mean`, `cosine_min`,
    `cosine_min_clip` (its index), `sqnr_db`, `relative_l2` (over all clips) and
    `relative_l2_max` (worst clip). Task "classify" adds agreement, KL divergence and, with labels,
    top-1, top-5 (from five classes on), calibration errors, flips and the paired drop with its
    one-sided 95 % bounds; "detect" adds `task_metrics.detection_metrics`, "restore"
    `task_metrics.video_metrics`.

    Args:
        baseline: outputs of the uncompressed model, `[N, ...]`; `[N, C]` for "classify".
        candidate: outputs of the compressed model for the same clips.
        labels: class of each clip, `[N]`, or None; read for "classify" only.
        task: "classify", "embed", "detect", "denoise", "restore" or "generic".
        layout: axes of a batch of frames, such as "NCTHW"; read for "restore" only.

    Raises:
        InputError: shapes, labels or the task do not fit, or the baseline is not finite.
        QualityGateError: the candidate's output is not finite; the message names the clip.
    """
    b, c = np.asarray(baseline), np.asarray(candidate)
    _check_outputs(b, c, task)
    sums = _sums(b, c)
    cosine, per_clip = _cosine(sums), _relative_l2(sums)
    noise = _quotient(float(sums.error.sum()), float(sums.baseline.sum()))
    metrics: Metrics = {
        "num_clips": len(b),
        "identical": bool(np.array_equal(b, c)),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "cosine_min_clip": int(cosine.argmin()),
        "sqnr_db": _finite_or_none(_decibels(noise)),
        "relative_l2": _finite_or_none(math.sqrt(noise)),
        "relative_l2_max": _finite_or_none(float(per_clip.max())),
    }
    if task == "classify":
        metrics |= _class_metrics(b, c)
        metrics |= _label_metrics(b, c, labels)
    elif task == "detect":
        metrics |= detection_metrics(b, c)
    elif task == "restore" and layout is not None:
        metrics |= video_metrics(b, c, layout)
    return metrics


def _class_metrics(b: NDArray[Any], c: NDArray[Any]) -> Metrics:
    divergence = kl_nats_per_clip(b, c)
    return {
        "agreement_percent": agreement_percent(b, c),
        "num_disagreements": int((b.argmax(axis=1) != c.argmax(axis=1)).sum()),
        "num_classes": b.shape[1],
        "kl_nats_mean": float(divergence.mean()),
        "kl_nats_p99": float(np.quantile(divergence, 0.99)),
    }


def _label_metrics(b: NDArray[Any], c: NDArray[Any], labels: ArrayLike | None) -> Metrics:
    keys = (
        "baseline_top1_percent", "top1_percent", "baseline_top5_percent", "top5_percent",
        "baseline_calibration_error_percent", "calibration_error_percent",
        "num_right_to_wrong", "num_wrong_to_right", "top1_drop_points",
        "top1_drop_points_lower", "top1_drop_points_upper",
    )  # fmt: skip
    metrics: Metrics = dict.fromkeys(keys)
    if labels is None:
        return metrics
    truth = _check_labels(labels, b.shape)
    ranks = {"baseline_": _ranks(b, truth), "": _ranks(c, truth)}
    for who, rank in ranks.items():
        metrics[f"{who}top1_percent"] = 100 * float(np.mean(rank < 1))
        if b.shape[1] >= 5:
            metrics[f"{who}top5_percent"] = 100 * float(np.mean(rank < 5))
        outputs = b if who else c
        metrics[f"{who}calibration_error_percent"] = expected_calibration_error(outputs, truth)
    was_right, is_right = ranks["baseline_"] < 1, ranks[""] < 1
    drop = paired_drop(
        num_clips=len(b),
        num_right_to_wrong=int((was_right & ~is_right).sum()),
        num_wrong_to_right=int((~was_right & is_right).sum()),
    )
    return metrics | {
        "num_right_to_wrong": drop.num_right_to_wrong,
        "num_wrong_to_right": drop.num_wrong_to_right,
        "top1_drop_points": drop.drop_points,
        "top1_drop_points_lower": drop.lower_points,
        "top1_drop_points_upper": drop.upper_points,
    }
