"""Metrics on arrays that are small enough to compute by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vcompress.spec.errors import InputError, QualityGateError
from vcompress.validate.metrics import (
    agreement_percent,
    compare_outputs,
    cosine_per_clip,
    kl_nats_per_clip,
    relative_l2,
    relative_l2_per_clip,
    sqnr_db,
    top_k_percent,
)

TASKS = ("classify", "embed", "denoise", "restore", "generic")


def test_sqnr_and_relative_error_by_hand() -> None:
    # sum b^2 = 9 + 16 + 0 + 25 = 50; b - c = (0, 1 / 0, 2): sum = 5; 10 log10(50 / 5) = 10 dB.
    b, c = np.array([[3.0, 4.0], [0.0, 5.0]]), np.array([[3.0, 3.0], [0.0, 3.0]])
    assert sqnr_db(b, c) == pytest.approx(10.0)
    assert relative_l2(b, c) == pytest.approx(math.sqrt(0.1))
    # Clip 0: 1 / 5; clip 1: 2 / 5.
    assert relative_l2_per_clip(b, c) == pytest.approx([0.2, 0.4])
    # Clip 0: (9 + 12) / (5 * sqrt(18)) = 0.98995; clip 1 points the same way.
    assert cosine_per_clip(b, c) == pytest.approx([0.9899495, 1.0])


def test_equal_outputs_have_infinite_sqnr_and_say_so_with_a_flag() -> None:
    b = np.arange(6.0).reshape(3, 2)
    assert sqnr_db(b, b) == math.inf
    metrics = compare_outputs(b, b, labels=None, task="generic")
    assert metrics["identical"] is True
    assert metrics["sqnr_db"] is None
    assert metrics["relative_l2"] == 0.0


def test_all_zero_outputs() -> None:
    zero, one = np.zeros((2, 3)), np.ones((2, 3))
    assert cosine_per_clip(zero, zero) == pytest.approx([1.0, 1.0])
    assert cosine_per_clip(zero, one) == pytest.approx([0.0, 0.0])
    both = compare_outputs(zero, zero, labels=None, task="generic")
    assert (both["identical"], both["relative_l2"], both["cosine_min"]) == (True, 0.0, 1.0)
    # Against a baseline of zeros no ratio is defined.
    noise = compare_outputs(zero, one, labels=None, task="generic")
    assert (noise["identical"], noise["sqnr_db"], noise["relative_l2"]) == (False, None, None)
    # A candidate of zeros loses the whole signal: 10 log10(1) = 0 dB.
    silent = compare_outputs(one, zero, labels=None, task="generic")
    assert (silent["sqnr_db"], silent["relative_l2"], silent["cosine_mean"]) == (0.0, 1.0, 0.0)


def test_kl_divergence_by_hand() -> None:
    # softmax(0, log 3) = (1/4, 3/4); softmax(0, 0) = (1/2, 1/2).
    # KL = 1/4 log(1/2) + 3/4 log(3/2) = 0.1308120 nats; the other way round 0.1438410.
    b, c = np.array([[0.0, math.log(3.0)]]), np.array([[0.0, 0.0]])
    assert kl_nats_per_clip(b, c) == pytest.approx([0.1308120])
    assert kl_nats_per_clip(c, b) == pytest.approx([0.1438410])
    assert kl_nats_per_clip(b, b + 1000.0) == pytest.approx([0.0], abs=1e-12)


def test_ranks_break_ties_towards_the_lower_class_as_argmax_does() -> None:
    scores = np.array([[1.0, 1.0, 0.0]])
    assert top_k_percent(scores, np.array([0]), 1) == 100.0
    assert top_k_percent(scores, np.array([1]), 1) == 0.0
    assert top_k_percent(scores, np.array([1]), 2) == 100.0
    assert agreement_percent(scores, np.array([[2.0, 0.0, 0.0]])) == 100.0


def one_hot(classes: list[int], num_classes: int = 6) -> np.ndarray:
    return np.eye(num_classes)[classes]


def test_accuracy_flips_and_drop_by_hand() -> None:
    labels = np.array([0, 1, 2, 3])
    # Baseline: right, right, right, wrong. Candidate: right, wrong, wrong, right.
    metrics = compare_outputs(
        one_hot([0, 1, 2, 0]), one_hot([0, 2, 1, 3]), labels=labels, task="classify"
    )
    assert metrics["baseline_top1_percent"] == 75.0
    assert metrics["top1_percent"] == 50.0
    assert metrics["num_right_to_wrong"] == 2
    assert metrics["num_wrong_to_right"] == 1
    assert metrics["top1_drop_points"] == 25.0
    assert metrics["agreement_percent"] == 25.0
    assert metrics["num_disagreements"] == 3
    # Ties among the other classes go to the lower index: label 3 has rank 3 for the baseline's
    # last clip, so it is in the top 5 everywhere.
    assert metrics["baseline_top5_percent"] == 100.0
    # n = 4, p = 3/6, q = 2/6: 1/6 + 1.644854 * sqrt((5/6 - 1/36) / 6)
    # = 0.166667 + 0.602698
    assert metrics["top1_drop_points_upper"] == pytest.approx(76.9364, abs=1e-3)


def test_keys_depend_on_the_task_only() -> None:
    labels = np.array([0, 1])
    b = one_hot([0, 1])
    with_labels = compare_outputs(b, b, labels=labels, task="classify")
    without = compare_outputs(b, b, labels=None, task="classify")
    assert with_labels.keys() == without.keys()
    assert without["top1_percent"] is None
    assert without["agreement_percent"] == 100.0
    for task in TASKS[1:]:
        metrics = compare_outputs(b, b, labels=labels, task=task)
        assert not any("top" in key or "agreement" in key or "kl" in key for key in metrics)


def test_top5_needs_five_classes() -> None:
    few = one_hot([0, 1], num_classes=4)
    metrics = compare_outputs(few, few, labels=np.array([0, 1]), task="classify")
    assert metrics["top5_percent"] is None
    assert metrics["top1_percent"] == 100.0


def test_one_clip_of_video_shape() -> None:
    b = np.linspace(-1, 1, 24, dtype=np.float32).reshape(1, 2, 3, 4)
    metrics = compare_outputs(b, b * np.float32(0.5), labels=None, task="restore")
    assert metrics["num_clips"] == 1
    # b - c = b / 2 everywhere: 20 log10(2) dB.
    assert metrics["sqnr_db"] == pytest.approx(20 * math.log10(2), abs=1e-5)
    assert metrics["cosine_min"] == pytest.approx(1.0)


def test_half_precision_is_not_summed_in_half_precision() -> None:
    # 100^2 * 1000 overflows float16.
    b = np.full((1, 1000), 100.0, dtype=np.float16)
    c = np.full((1, 1000), 99.0, dtype=np.float16)
    assert compare_outputs(b, c, labels=None, task="embed")["sqnr_db"] == pytest.approx(40.0)


def test_the_worst_clip_is_named() -> None:
    b = np.ones((5, 4))
    c = b.copy()
    c[3, 0] = -1.0
    assert compare_outputs(b, c, labels=None, task="generic")["cosine_min_clip"] == 3


def test_a_candidate_with_nan_misses_the_bar_and_the_clip_is_named() -> None:
    b = np.ones((5, 4))
    c = b.copy()
    c[2, 1], c[4, 0] = np.nan, np.inf
    with pytest.raises(QualityGateError, match=r"candidate's output for clip 2 .*\(2 of 5 clips"):
        compare_outputs(b, c, labels=None, task="generic")
    with pytest.raises(InputError, match="baseline's output for clip 2"):
        compare_outputs(c, b, labels=None, task="generic")


@pytest.mark.parametrize(
    ("shapes", "labels", "task", "match"),
    [
        (((2, 3), (2, 4)), None, "generic", "same shape"),
        (((0, 3), (0, 3)), None, "generic", "at least one clip"),
        (((2, 3, 4), (2, 3, 4)), None, "classify", r"\[N, C\]"),
        (((2, 1), (2, 1)), None, "classify", "two classes"),
        (((2, 3), (2, 3)), None, "segment", "task must be one of"),
        (((2, 3), (2, 3)), [0, 3], "classify", r"0\.\.2.*clip 1 .* label 3"),
        (((2, 3), (2, 3)), [0, 1, 2], "classify", "2 integers"),
        (((2, 3), (2, 3)), [0.0, 1.0], "classify", "integers"),
    ],
)
def test_what_does_not_fit_is_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    labels: list[float] | None,
    task: str,
    match: str,
) -> None:
    with pytest.raises(InputError, match=match):
        compare_outputs(np.ones(shapes[0]), np.ones(shapes[1]), labels=labels, task=task)
