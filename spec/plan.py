"""The compression plan: every decision, as data.

A plan lists each candidate layer by its full name, one layer a line, with its format and the
reason for it. It is the only configuration of vcompress: `vcompress apply` executes exactly what
stands here, and a person may edit a line. Unknown keys and names are errors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vcompress.spec import strict_json
from vcompress.spec.errors import InputError
from vcompress.spec.layer_choice import TENSOR_WORDS, LayerChoice, LayerFacts, misfits
from vcompress.spec.strict_json import check_keys
from vcompress.spec.token_section import TokenSection

__all__ = [
    "SCHEMA", "TENSOR_WORDS", "CompressionPlan", "LayerChoice", "LayerFacts", "check_plan",
]  # fmt: skip

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """All decisions for one model and one target.

    Attributes:
        target: name in `spec.target.TARGETS`.
        seed: of every random choice.
        model: identity of the model: family, weights_sha256, num_blocks, token_grid.
        evidence: what the decisions rest on: calibration digest, number of clips, versions.
        quantize: the choice for every candidate layer, in model order.
        tokens: token reduction, or None.
        tensors: file beside the plan with calibrated tensors (see `TENSOR_WORDS`) and its sha256,
            or None.
    """

    target: str
    seed: int
    model: Mapping[str, Any]
    evidence: Mapping[str, Any]
    quantize: Mapping[str, LayerChoice]
    tokens: TokenSection | None = None
    tensors: Mapping[str, str] | None = None
    schema: int = field(default=SCHEMA)

    def as_dict(self) -> dict[str, Any]:
        """Plain data in the order of the file."""
        return {
            "schema": self.schema,
            "target": self.target,
            "seed": self.seed,
            "model": dict(self.model),
            "evidence": dict(self.evidence),
            "tokens": None if self.tokens is None else self.tokens.as_dict(),
            "quantize": {name: choice.as_dict() for name, choice in self.quantize.items()},
            "tensors": None if self.tensors is None else dict(self.tensors),
        }

    def to_json(self) -> str:
        """The plan file: one layer a line."""
        data = self.as_dict()
        layers = data["quantize"]
        lines = [
            f"    {json.dumps(name)}: {json.dumps(layers[name], ensure_ascii=False)}"
            for name in layers
        ]
        data["quantize"] = "@layers@"
        text = strict_json.dump(data)
        body = "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
        return text.replace('"@layers@"', body, 1)

    @classmethod
    def from_dict(cls, data: Any) -> CompressionPlan:
        """Read a plan; unknown or missing keys and wrong values are an `InputError`."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, dict) else None
            message = f"plan: schema must be {SCHEMA}, got {got!r}"
            raise InputError(message)
        check_keys(
            data,
            required=("schema", "target", "seed", "model", "evidence", "tokens", "quantize",
                      "tensors"),
            where="plan",
        )  # fmt: skip
        _check_types(
            data, {"target": str, "seed": int, "model": dict, "evidence": dict, "quantize": dict},
            where="plan",
        )  # fmt: skip
        tokens, tensors = data["tokens"], data["tensors"]
        if tensors is not None:
            check_keys(tensors, required=("file", "sha256"), where="tensors")
            _check_types(tensors, {"file": str, "sha256": str}, where="tensors")
        return cls(
            target=data["target"],
            seed=data["seed"],
            model=data["model"],
            evidence=data["evidence"],
            quantize={
                name: LayerChoice.from_dict(choice, f"quantize.{name}")
                for name, choice in data["quantize"].items()
            },
            tokens=None if tokens is None else TokenSection.from_dict(tokens),
            tensors=tensors,
        )

    @classmethod
    def load(cls, path: Path) -> CompressionPlan:
        """Read the plan file `path`."""
        return cls.from_dict(strict_json.read(path))


_TYPE_NAMES = {str: "a string", int: "an integer", bool: "true or false", dict: "an object"}


def _check_types(data: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    for key, expected in types.items():
        value = data[key]
        # JSON's true is an integer for Python.
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
            message = f"{where}: {key} must be {_TYPE_NAMES[expected]}, got {value!r}"
            raise InputError(message)


def check_plan(
    plan: CompressionPlan,
    *,
    layers: Mapping[str, LayerFacts],
    blocks: tuple[str, ...],
    weights_sha256: str,
    parts: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Raise one `InputError` that lists everything in `plan` that does not fit the model.

    Args:
        plan: what is checked.
        layers: of the model, by full name.
        blocks: full names of the model's repeated blocks.
        weights_sha256: of the model.
        parts: what the tensors file has, by layer; None if it was not read.
    """
    problems: list[str] = []
    if plan.model.get("weights_sha256") != weights_sha256:
        problems.append(
            f"the plan was made for weights {str(plan.model.get('weights_sha256'))[:12]}, this "
            f"model has {weights_sha256[:12]}; make a plan for this model with vcompress plan"
        )
    for name, choice in plan.quantize.items():
        if name not in layers:
            problems.append(f"quantize.{name}: no such layer{strict_json.nearest(name, layers)}")
            continue
        have = None if parts is None else parts.get(name, ())
        problems += [f"quantize.{name}: {text}" for text in misfits(choice, layers[name], have)]
    problems += [
        f"quantize: layer {name} is missing; add a line for it, at least with format keep"
        for name in layers
        if name not in plan.quantize
    ]
    if plan.tokens is not None:
        problems += [
            f"tokens.sites.{name}: no such block{strict_json.nearest(name, blocks)}"
            for name in plan.tokens.sites
            if name not in blocks
        ]
        if plan.tokens.readout is not None and plan.tokens.readout not in layers:
            near = strict_json.nearest(plan.tokens.readout, layers)
            problems.append(f"tokens.readout: no layer {plan.tokens.readout}{near}")
    if problems:
        message = "the plan does not fit the model:\n  " + "\n  ".join(problems)
        raise InputError(message)
