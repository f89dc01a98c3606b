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
from vcompress.spec.attention_section import (
    AttentionChoice,
    read_attention,
    unknown_attentions,
)
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.dynamic_section import STORED, DynamicSection
from vcompress.spec.errors import InputError
from vcompress.spec.layer_choice import TENSOR_WORDS, LayerChoice, LayerFacts, misfits
from vcompress.spec.strict_json import check_keys
from vcompress.spec.target import find_target
from vcompress.spec.token_section import TokenSection

__all__ = [
    "SCHEMA", "TENSOR_WORDS", "CompressionPlan", "LayerChoice", "LayerFacts", "check_plan",
]  # fmt: skip

SCHEMA = 1
_FLAGS = {
    "mean": "; give it with --mean", "std": "; give it with --std", "fps": "; give it with --fps",
    "stride": "; give it with --clip-stride",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """All decisions for one model and one target.

    Attributes:
        target: name in `spec.target.TARGETS`.
        seed: of every random choice.
        model: identity of the model: family, weights_sha256, num_blocks, token_grid, and clip: how
            a video becomes its input (a plan without it, or of a denoiser, is not checked for it).
        evidence: what the decisions rest on: calibration digest, number of clips, versions.
        quantize: the choice for every candidate layer, in model order.
        attention: the choice for the products of every attention, by the full name of its module;
            None to leave all as they are.
        tokens: token reduction, or None.
        cache: what a denoiser uses again over its steps, or None.
        dynamic_precision: how the inputs of a denoiser's NVFP4 layers change over its steps, or
            None.
        tensors: file beside the plan with calibrated tensors (see `TENSOR_WORDS`) and its sha256,
            or None.
    """

    target: str
    seed: int
    model: Mapping[str, Any]
    evidence: Mapping[str, Any]
    quantize: Mapping[str, LayerChoice]
    tokens: TokenSection | None = None
    cache: CacheSection | None = None
    dynamic_precision: DynamicSection | None = None
    attention: Mapping[str, AttentionChoice] | None = None
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
            "cache": None if self.cache is None else self.cache.as_dict(),
            "dynamic_precision": None
            if self.dynamic_precision is None
            else self.dynamic_precision.as_dict(),
            "quantize": {name: choice.as_dict() for name, choice in self.quantize.items()},
            "attention": None
            if self.attention is None
            else {name: choice.as_dict() for name, choice in self.attention.items()},
            "tensors": None if self.tensors is None else dict(self.tensors),
        }

    def to_json(self) -> str:
        """The plan file: one layer a line."""
        data = self.as_dict()
        for name in ("cache", "dynamic_precision", "attention"):
            if data[name] is None:
                # Plans that do without these sections stay as they were.
                del data[name]
        sections = {name: data[name] for name in ("quantize", "attention") if name in data}
        text = strict_json.dump({**data, **{name: f"@{name}@" for name in sections}})
        for name, lines in sections.items():
            text = text.replace(f'"@{name}@"', _one_a_line(lines), 1)
        return text

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
            optional=("cache", "dynamic_precision", "attention"),
            where="plan",
        )  # fmt: skip
        _check_types(
            data, {"target": str, "seed": int, "model": dict, "evidence": dict, "quantize": dict},
            where="plan",
        )  # fmt: skip
        find_target(data["target"])
        tokens, tensors, cache = data["tokens"], data["tensors"], data.get("cache")
        attention, dynamic = data.get("attention"), data.get("dynamic_precision")
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
            cache=None if cache is None else CacheSection.from_dict(cache),
            dynamic_precision=None if dynamic is None else DynamicSection.from_dict(dynamic),
            attention=None if attention is None else read_attention(attention),
            tensors=tensors,
        )

    @classmethod
    def load(cls, path: Path) -> CompressionPlan:
        """Read the plan file `path`."""
        return cls.from_dict(strict_json.read(path))


def _one_a_line(lines: Mapping[str, Any]) -> str:
    """An object inside the plan's, with each of its values on one line."""
    written = [
        f"    {json.dumps(name)}: {json.dumps(line, ensure_ascii=False)}"
        for name, line in lines.items()
    ]
    return "{\n" + ",\n".join(written) + "\n  }" if written else "{}"


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
    clip: Mapping[str, Any] | None = None,
    parts: Mapping[str, Collection[str]] | None = None,
    attentions: Collection[str] = (),
) -> None:
    """Raise one `InputError` that lists everything in `plan` that does not fit the model.

    Args:
        plan: what is checked.
        layers: of the model, by full name.
        blocks: full names of the model's repeated blocks.
        weights_sha256: of the model.
        clip: how a video becomes the model's input, as plain data; None for a model of no clips.
        parts: what the tensors file has, by layer; None if it was not read.
        attentions: full names of the modules that call attention; needed where the plan has a
            section on them.
    """
    problems: list[str] = []
    if plan.model.get("weights_sha256") != weights_sha256:
        problems.append(
            f"the plan was made for weights {str(plan.model.get('weights_sha256'))[:12]}, this "
            f"model has {weights_sha256[:12]}; make a plan for this model with vcompress plan"
        )
    if clip is not None:
        problems += _other_clips(plan.model.get("clip", clip), clip)
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
    if plan.attention is not None:
        problems += unknown_attentions(plan.attention, attentions)
    if plan.cache is not None:
        problems += [
            f"cache.blocks: no block {name}{strict_json.nearest(name, blocks)}"
            for name in plan.cache.blocks
            if name not in blocks
        ]
    if plan.dynamic_precision is not None:
        problems += _without_layers(plan, blocks)
    if problems:
        message = "the plan does not fit the model:\n  " + "\n  ".join(problems)
        raise InputError(message)


def _without_layers(plan: CompressionPlan, blocks: tuple[str, ...]) -> list[str]:
    """Blocks of the section `dynamic_precision` that are not there, or have no layer to change."""
    assert plan.dynamic_precision is not None
    stored = [name for name, choice in plan.quantize.items() if choice.format == STORED]
    problems = []
    for block in plan.dynamic_precision.blocks:
        where = f"dynamic_precision.blocks: {block}"
        if block not in blocks:
            problems.append(f"{where} is no block{strict_json.nearest(block, blocks)}")
        elif not any(name.startswith(f"{block}.") for name in stored):
            problems.append(f"{where} has no layer in {STORED} that could change; take it out")
    return problems


def _other_clips(planned: Any, clip: Mapping[str, Any]) -> list[str]:
    """What differs between the clips that a plan was made for and those of the model."""
    if not isinstance(planned, Mapping):
        return [f"model.clip must be an object, got {planned!r}"]
    return [
        f"model.clip: {key} is {planned.get(key)!r} in the plan and {clip.get(key)!r} in the "
        f"model{_FLAGS.get(key, '')}"
        for key in {**clip, **planned}
        if planned.get(key) != clip.get(key)
    ]
