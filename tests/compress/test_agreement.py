"""Agreement of predictions with measurements."""

from __future__ import annotations

import math

import pytest

from vcompress.compress.agreement import Agreement, compare_sensitivities
from vcompress.compress.allocate import Group, Option

Losses = dict[str, dict[str, float]]


def compared(predicted: Losses, measured: Losses, bits: float = 12.0) -> Agreement:
    groups = [
        Group(
            (layer,),
            (
                *(
                    Option(formats={layer: name}, loss=loss, cost={"a": 400, "b": 800}[name])
                    for name, loss in formats.items()
                ),
                Option(formats={layer: "keep"}, loss=0.0, cost=3200),
            ),
        )
        for layer, formats in predicted.items()
    ]
    return compare_sensitivities(predicted, measured, groups, 100 * len(groups), bits)


def losses(*values: float) -> Losses:
    return {f"layer{index}": {"a": 10 * value, "b": value} for index, value in enumerate(values)}


def test_perfect_predictions() -> None:
    found = compared(losses(1, 2, 3, 4, 5), losses(10, 20, 30, 40, 50))
    assert found.spearman == pytest.approx(1)
    assert found.spearman_by_format == {"a": pytest.approx(1), "b": pytest.approx(1)}
    assert found.top_overlap == 1
    assert found.regret == pytest.approx(0)
    assert found.num_pairs == 10


def test_reversed_predictions() -> None:
    found = compared(losses(1, 2, 3, 4, 5), losses(5, 4, 3, 2, 1), bits=6.0)
    assert found.spearman_by_format["a"] == pytest.approx(-1)
    assert found.top_overlap == 0
    assert found.regret > 0.5


def test_losses_that_are_not_finite_are_the_worst() -> None:
    measured = losses(1, 2, 3, 4, 5)
    measured["layer4"]["a"] = math.nan
    found = compared(losses(1, 2, 3, 4, 5), measured)
    assert found.spearman == pytest.approx(1)
    assert math.isfinite(found.regret)
    assert found.top_overlap == 1


def test_nothing_to_order() -> None:
    one = {"layer0": {"a": 1.0}}
    assert compared(one, one).spearman == 1
    assert compared(losses(0, 0), losses(0, 0)).spearman == 1
    assert compared(losses(0, 0), losses(1, 2)).spearman == 0
    assert compared(losses(0, 0), losses(1, 2)).regret >= 0
