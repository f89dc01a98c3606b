"""The section `attention` of a plan: optional, editable, strict."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vcompress.spec.attention_section import AttentionChoice
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan, check_plan

DIGEST = "ab" * 32
LINE = {
    "format": "int8", "smooth_keys": True, "query_amax": 2.0, "key_amax": 3.0, "value_amax": 4.0,
    "score": 0.01, "reason": "because",
}  # fmt: skip


def plan_with(attention: Any) -> CompressionPlan:
    plan = CompressionPlan(
        target="int8", seed=0, model={"weights_sha256": DIGEST}, evidence={}, quantize={}
    )
    data = {**json.loads(plan.to_json()), "attention": attention}
    return CompressionPlan.from_dict(data)


def test_a_plan_without_the_section_is_written_and_read_as_before() -> None:
    plan = plan_with(None)
    assert plan.attention is None
    assert "attention" not in json.loads(plan.to_json())
    data = json.loads(plan.to_json())
    assert CompressionPlan.from_dict(data) == plan


def test_a_line_survives_the_file_and_stands_on_one_line() -> None:
    plan = plan_with({"blocks.0.attn": LINE, "blocks.1.attn": {"format": "keep", "reason": "why"}})
    assert plan.attention is not None
    assert plan.attention["blocks.0.attn"] == AttentionChoice(**LINE)
    text = plan.to_json()
    assert f'    "blocks.0.attn": {json.dumps(LINE)}' in text
    assert '    "blocks.1.attn": {"format": "keep", "reason": "why"}\n' in text
    assert CompressionPlan.from_dict(json.loads(text)) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int9"}, "did you mean 'int8'"),
        ({"format": "nvfp4"}, "choose one of: int8, fp8, int8_fp8, int8_keep, keep"),
        ({"smooth_key": True}, "did you mean 'smooth_keys'"),
        ({"smooth_keys": 1}, "true or false"),
        ({"query_amax": -1.0}, "query_amax must be a number >= 0"),
        ({"key_amax": None}, "int8 needs key_amax"),
        ({"value_amax": True}, "value_amax must be a number"),
        ({"reason": 3}, "reason must be a string"),
    ],
)
def test_what_is_wrong_in_a_line_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_with({"a": {**LINE, **change}})


def test_an_unknown_attention_is_an_error_with_the_nearest_name() -> None:
    plan = plan_with({"blocks.0.atn": LINE})
    known: dict[str, Any] = {"layers": {}, "blocks": (), "weights_sha256": DIGEST}
    with pytest.raises(InputError, match=r"attention.blocks.0.atn: no such.*'blocks.0.attn'"):
        check_plan(plan, attentions=("blocks.0.attn",), **known)
    renamed = dataclasses.replace(plan, attention={"blocks.0.attn": AttentionChoice(**LINE)})
    check_plan(renamed, attentions=("blocks.0.attn",), **known)


def test_ranges_may_be_left_out_of_a_kept_line() -> None:
    plan = plan_with({"a": {"format": "keep", "reason": ""}})
    assert plan.attention == {"a": AttentionChoice(format="keep", reason="")}
