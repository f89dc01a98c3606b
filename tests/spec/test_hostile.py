"""Files of vcompress that somebody edited badly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan

PLAN: dict[str, Any] = {
    "schema": 1, "target": "int8", "seed": 0, "model": {}, "evidence": {}, "tokens": None,
    "quantize": {"a": {"format": "int8", "reason": "r", "input_amax": 1.0}}, "tensors": None,
}  # fmt: skip
TOKENS = {"attention": "plain", "num_patches": 8, "sites": {}, "readout": None}


@pytest.mark.parametrize(
    "change",
    [
        {"target": ["x"]}, {"seed": "abc"}, {"seed": None}, {"seed": True}, {"model": None},
        {"evidence": 5}, {"tensors": 5}, {"tensors": {}}, {"tensors": {"file": 3, "sha256": "x"}},
        {"tokens": {**TOKENS, "num_patches": "8"}}, {"tokens": {**TOKENS, "attention": "no"}},
        {"tokens": {**TOKENS, "readout": 3}}, {"tokens": {**TOKENS, "sites": []}},
        {"tokens": {**TOKENS, "sites": {"a": {"keep": 1}}}},
        {"tokens": {**TOKENS, "sites": {"a": {"technique": 3, "keep": 1}}}},
        {"tokens": {**TOKENS, "sites": {"a": {"technique": "t", "keep": 0}}}},
        {"quantize": {"a": {"format": "int8", "reason": None}}},
        {"quantize": {"a": {"format": "int8", "reason": "r", "input_amax": 10**400}}},
        {"quantize": {"a": {"format": "int8", "reason": "r", "input_amax": 1e308}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_type_in_a_plan_is_an_input_error(change: dict[str, Any]) -> None:
    CompressionPlan.from_dict(PLAN)
    with pytest.raises(InputError):
        CompressionPlan.from_dict({**PLAN, **change})


def test_a_number_too_large_for_a_float_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN).replace("1.0", "1e999"))
    with pytest.raises(InputError, match="1e999 is not allowed"):
        CompressionPlan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0.0}, {"fps": -5.0}, {"fps": float("nan")}, {"std": (float("nan"),)},
        {"dtype": "int4"}, {"resize": "squash"}, {"num_frames": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_clip_that_cannot_be_made_is_an_input_error(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ClipSpec(**{"num_frames": 4, "height": 8, "width": 8, **change})


@pytest.mark.parametrize("files", [5, [{"path": 3, "role": "x", "bytes": 1, "sha256": "x"}]])
def test_a_damaged_list_of_files_is_an_input_error(tmp_path: Path, files: Any) -> None:
    keys = ("vcompress", "created", "name", "source", "task", "inputs", "outputs", "clip",
            "precision", "requires")  # fmt: skip
    manifest = {"schema": 1, **dict.fromkeys(keys, ""), "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError):
        Artifact.open(tmp_path)
