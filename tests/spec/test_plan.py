"""The plan file: strict, complete, one layer a line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcompress.spec.errors import InputError
from vcompress.spec.plan import (
    CompressionPlan,
    LayerChoice,
    LayerFacts,
    check_plan,
)
from vcompress.spec.token_section import TokenSection, TokenSite

LAYERS = {
    "patch": LayerFacts(kind="conv3d", weight_shape=(32, 1, 2, 8, 8)),
    "blocks.0.fc": LayerFacts(kind="linear", weight_shape=(64, 32)),
    "blocks.1.fc": LayerFacts(kind="linear", weight_shape=(64, 32)),
    "odd": LayerFacts(kind="linear", weight_shape=(4, 30)),
}
DIGEST = "ab" * 32


def make_plan(**formats: str) -> CompressionPlan:
    chosen = {"patch": "int8", "blocks.0.fc": "nvfp4", "blocks.1.fc": "nvfp4", "odd": "keep"}
    chosen |= {name.replace("__", "."): value for name, value in formats.items()}
    return CompressionPlan(
        target="nvfp4",
        seed=0,
        model={"family": "videomae", "weights_sha256": DIGEST},
        evidence={"num_clips": 4},
        quantize={
            name: LayerChoice(format=value, reason="because", input_amax=1.5, score=0.01)
            for name, value in chosen.items()
        },
    )


def line(**keys: object) -> dict[str, object]:
    return {"quantize": {"patch": {"format": "int8", "reason": "", **keys}}}


def check(plan: CompressionPlan, parts: dict[str, set[str]] | None = None) -> None:
    check_plan(
        plan, layers=LAYERS, blocks=("blocks.0", "blocks.1"), weights_sha256=DIGEST, parts=parts
    )


def with_line(plan: CompressionPlan, name: str, **keys: Any) -> CompressionPlan:
    choice = dataclasses.replace(plan.quantize[name], **keys)
    return dataclasses.replace(plan, quantize={**plan.quantize, name: choice})


def test_a_plan_survives_its_file() -> None:
    plan = make_plan()
    assert CompressionPlan.from_dict(json.loads(plan.to_json())) == plan


def test_rotation_and_tensors_survive_the_file() -> None:
    words = ("input_smoothing", "low_rank", "weight")
    plan = with_line(make_plan(), "blocks.0.fc", rotation=16, tensors=words)
    text = plan.to_json()
    assert '"rotation": 16, "tensors": ["input_smoothing", "low_rank", "weight"]' in text
    assert CompressionPlan.from_dict(json.loads(text)) == plan
    # A line without them does not mention them.
    assert text.count("rotation") == 1


def test_formats_with_dynamic_scales_need_no_range() -> None:
    for format, fits in {"mxfp8": True, "int8_token": True, "nvfp4": False}.items():
        plan = with_line(make_plan(), "blocks.0.fc", format=format, input_amax=None)
        if fits:
            check(plan)
        else:
            with pytest.raises(InputError, match="nvfp4 needs input_amax"):
                check(plan)


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("blocks.0.fc", {"rotation": 64}, "rotation 64 needs .* divisible by it, got linear with"),
        ("patch", {"rotation": 16}, "rotation 16 needs a linear layer .*, got conv3d"),
        ("patch", {"tensors": ("low_rank",)}, "low_rank is defined for linear layers, not conv3d"),
        ("patch", {"tensors": ("bias",)}, "quantize.patch: the tensors file has no bias"),
        ("blocks.0.fc", {"tensors": ("low_rank",)}, "file has no low_rank for this layer"),
        ("blocks.1.fc", {"tensors": ("weight",)}, "file has no weight for this layer"),
    ],
)
def test_rotation_and_tensors_must_fit_the_layer(
    name: str, keys: dict[str, Any], problem: str
) -> None:
    parts = {"blocks.0.fc": {"low_rank_up", "weight_packed"}}
    with pytest.raises(InputError, match=problem):
        check(with_line(make_plan(), name, **keys), parts)


def test_a_kept_layer_may_say_what_it_likes() -> None:
    keys = {"format": "keep", "rotation": 64, "tensors": ("weight", "low_rank")}
    check(with_line(make_plan(), "blocks.0.fc", **keys), {})


def test_each_layer_is_one_line() -> None:
    lines = [line for line in make_plan().to_json().splitlines() if '"format"' in line]
    assert len(lines) == len(LAYERS)
    assert all(line.strip().startswith('"') and "reason" in line for line in lines)


def test_floats_have_six_significant_digits() -> None:
    choice = LayerChoice(format="int8", reason="", input_amax=1 / 3, score=2 / 3)
    assert choice.as_dict()["input_amax"] == 0.333333
    assert choice.as_dict()["score"] == 0.6667


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sed": 1}, "did you mean 'seed'"),
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"quantize": {"patch": {"format": "nvfp5", "reason": ""}}}, "did you mean 'nvfp4'"),
        (
            {"quantize": {"patch": {"format": "int8", "reason": "", "bits": 3}}},
            "unknown key 'bits'",
        ),
        ({"quantize": {"patch": {"reason": ""}}}, "missing key 'format'"),
        (
            {"quantize": {"patch": {"format": "int8", "reason": "", "input_amax": -1}}},
            "input_amax must be a number >= 0, got -1",
        ),
        ({"tokens": {"attention": "plain"}}, "tokens: missing key"),
        (line(rotation=48), "rotation must be a power of two, at least 2, got 48"),
        (line(rotation=True), "rotation must be a power of two, at least 2, got True"),
        (line(rotation="16"), "rotation must be a power of two, at least 2, got '16'"),
        (line(tensors="bias"), "tensors must be a list of words, got 'bias'"),
        (line(tensors=["lowrank"]), "got 'lowrank'; did you mean 'low_rank'"),
        (line(tensors=["bias", "bias"]), "different words out of .*, got 'bias'"),
        (line(tensors=[["bias"]]), "different words out of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_plan_says_what_is_wrong(change: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        CompressionPlan.from_dict({**make_plan().as_dict(), **change})


def test_all_misfits_stand_in_one_message() -> None:
    plan = make_plan(odd="nvfp4", patch="nvfp4", blocks__0__fcc="int8")
    plan = dataclasses.replace(
        plan,
        tokens=TokenSection(
            attention="plain", num_patches=8,
            sites={"block.0": TokenSite(technique="bipartite", keep=4)},
        ),
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        check(plan)
    message = str(caught.value)
    assert "odd: nvfp4 needs a contraction size divisible by 16, got 30" in message
    assert "patch: nvfp4 is defined for linear layers, not conv3d" in message
    assert "no such layer; did you mean 'blocks.0.fc'" in message
    assert "tokens.sites.block.0: no such block; did you mean 'blocks.0'" in message


def test_a_missing_layer_and_foreign_weights_are_found() -> None:
    plan = make_plan()
    rest = {name: choice for name, choice in plan.quantize.items() if name != "patch"}
    with pytest.raises(InputError, match="layer patch is missing"):
        check(dataclasses.replace(plan, quantize=rest))
    with pytest.raises(InputError, match="made for weights cdcd"):
        check(dataclasses.replace(plan, model={"weights_sha256": "cd" * 32}))
    check(plan)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    # Hostile text must end in an InputError, never in another exception.
    from vcompress.spec import strict_json

    try:
        CompressionPlan.from_dict(strict_json.parse(text, "plan"))
    except InputError:
        return
    pytest.fail("random text was taken for a plan")


def test_duplicate_keys_and_nan_are_refused() -> None:
    from vcompress.spec import strict_json

    with pytest.raises(InputError, match="given twice: a"):
        strict_json.parse('{"a": 1, "a": 2}', "plan")
    with pytest.raises(InputError, match="NaN is not allowed"):
        strict_json.parse('{"a": NaN}', "plan")
    with pytest.raises(InputError, match="not valid JSON"):
        strict_json.parse("[" * 100_000, "plan")


def test_a_plan_made_for_other_clips_is_refused_with_the_flag_that_mends_it() -> None:
    clip = {"num_frames": 16, "fps": 8.0, "mean": [0.5]}
    plan = dataclasses.replace(make_plan(), model={"weights_sha256": DIGEST, "clip": clip})
    arguments = {
        "layers": LAYERS, "blocks": ("blocks.0", "blocks.1"), "weights_sha256": DIGEST,
    }  # fmt: skip
    check_plan(plan, clip=dict(clip), **arguments)
    with pytest.raises(InputError, match=r"fps is 8\.0 in the plan and None.*--fps") as caught:
        check_plan(plan, clip={**clip, "fps": None, "mean": [0.0]}, **arguments)
    assert "--mean" in str(caught.value)
    assert "num_frames" not in str(caught.value)
    # A plan that says nothing of clips, and one of a model without clips.
    check_plan(make_plan(), clip=clip, **arguments)
    check_plan(plan, clip=None, **arguments)
