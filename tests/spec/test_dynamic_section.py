"""The section `dynamic_precision` of a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vcompress.spec.dynamic_section import DynamicSection, ErrorLine
from vcompress.spec.errors import InputError
from vcompress.spec.layer_choice import LayerChoice, LayerFacts
from vcompress.spec.plan import CompressionPlan, check_plan

SECTION = DynamicSection(
    signal="added", threshold=0.05, num_steps=50, protect_first=2, protect_last=1,
    blocks={"blocks.0": ErrorLine(alpha=0.1, beta=0.02)},
)  # fmt: skip
PLAN = CompressionPlan(
    target="nvfp4", seed=0, model={"weights_sha256": "a"}, evidence={},
    quantize={"blocks.0.fc": LayerChoice(format="nvfp4", reason="", input_amax=1.0)},
    dynamic_precision=SECTION,
)  # fmt: skip
LAYERS = {"blocks.0.fc": LayerFacts(kind="linear", weight_shape=(16, 16))}


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    assert CompressionPlan.load(tmp_path / "plan.json") == PLAN
    assert "dynamic_precision" not in replace(PLAN, dynamic_precision=None).to_json()


def test_a_prediction_up_to_the_threshold_takes_four_bits() -> None:
    # 0.1 * signal + 0.02 is at most 0.05 up to a signal of 0.3.
    assert SECTION.takes_four_bits("blocks.0", 5, 0.29)
    assert not SECTION.takes_four_bits("blocks.0", 5, 0.31)
    assert not SECTION.takes_four_bits("blocks.0", 5, None)
    assert [step for step in range(50) if SECTION.protects(step)] == [0, 1, 49]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"signal": "colour"}, "signal must be one of"),
        ({"fine": "int8"}, "fine must be one of"),
        ({"threshold": None}, "threshold must be a number"),
        ({"num_steps": True}, "num_steps must be an integer"),
        ({"blocks": {}}, "has no block"),
        ({"blocks": {"blocks.0": [1]}}, "must be .alpha, beta."),
        ({"blocks": []}, "must be an object"),
        ({"protects": 1}, "protects"),
    ],
)
def test_what_is_wrong_is_an_error(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        DynamicSection.from_dict({**SECTION.as_dict(), **change})


def test_blocks_must_be_there_and_have_a_layer_to_change() -> None:
    check_plan(PLAN, layers=LAYERS, blocks=("blocks.0",), weights_sha256="a")
    with pytest.raises(InputError, match=r"blocks\.0 is no block"):
        check_plan(PLAN, layers=LAYERS, blocks=("blocks.1",), weights_sha256="a")
    other = replace(PLAN, quantize={"blocks.0.fc": LayerChoice(format="keep", reason="")})
    with pytest.raises(InputError, match="has no layer in nvfp4"):
        check_plan(other, layers=LAYERS, blocks=("blocks.0",), weights_sha256="a")
