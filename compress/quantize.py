"""Choose a format for every layer, and freeze the layers into it.

The choice is the first format of the target that the layer's shape allows and that the layer can
bear: its measured score (see `block_error`) stays below `max_layer_error`. A layer that cannot
bear the first format gets the next; the last is to keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vcompress.compress.frozen import freeze
from vcompress.compress.tensors import ModelTensors, select
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import LayerChoice
from vcompress.spec.target import Target

__all__ = ["apply_choices", "candidate_formats", "choose"]


def candidate_formats(model: VideoModel, target: Target) -> dict[str, str]:
    """For every layer the first format of `target` that its kind and shape allow."""
    return {
        name: next(
            (candidate for candidate in target.formats if facts.objection(candidate) is None),
            FLOAT,
        )
        for name, facts in model.layers.items()
    }


def choose(
    model: VideoModel, target: Target, *,
    input_amax: Mapping[str, float], scores: Mapping[str, float], max_layer_error: float,
) -> dict[str, LayerChoice]:  # fmt: skip
    """The choice for every layer of `model`, in model order."""
    firsts = candidate_formats(model, target)
    return {
        name: _choose_one(
            model, name, target, firsts[name], input_amax.get(name), scores.get(name),
            max_layer_error,
        )
        for name in model.layers
    }  # fmt: skip


def _choose_one(
    model: VideoModel, name: str, target: Target, first: str, input_amax: float | None,
    score: float | None, max_layer_error: float,
) -> LayerChoice:  # fmt: skip
    choice = LayerChoice(format=FLOAT, reason="", input_amax=input_amax, score=score)
    objection = model.layers[name].objection(target.formats[0])
    if first == FLOAT:
        return replace(choice, reason=objection or "the target has no format for this layer")
    if input_amax is None:
        return replace(choice, reason="no calibration clip reached this layer")
    shape_note = "" if objection is None else f"{objection}; "
    if score is None:
        reason = "the clips that errors are measured on do not reach this layer, others do"
        return replace(choice, reason=reason)
    if score <= max_layer_error:
        reason = f"{shape_note}error {score:.2%} within {max_layer_error:.2%}"
        return replace(choice, format=first, reason=reason)
    fallback = _next_format(target, first, name, model)
    reason = f"{shape_note}{first} would cause {score:.2%} error, above {max_layer_error:.2%}"
    return replace(choice, format=fallback, reason=reason)


def _next_format(target: Target, rejected: str, name: str, model: VideoModel) -> str:
    facts = model.layers[name]
    later = target.formats[target.formats.index(rejected) + 1 :]
    return next(candidate for candidate in (*later, FLOAT) if facts.objection(candidate) is None)


def apply_choices(
    model: VideoModel, choices: Mapping[str, LayerChoice], tensors: ModelTensors
) -> None:
    """Replace every chosen layer of `model.module` by its frozen form, in place.

    Args:
        model: is changed.
        choices: by layer; those to keep a layer are passed over.
        tensors: calibrated ones; a layer takes those that its choice names.
    """
    for name, choice in choices.items():
        if choice.format == FLOAT:
            continue
        layer = model.layer(name)
        frozen = freeze(
            layer,
            choice.format,
            choice.rounded_amax,
            rotation=choice.rotation,
            tensors=select(tensors.get(name, {}), choice.tensors),
            name=name,
        )
        # A layer that is used in several places has several names, and stands in the plan by one.
        for place, module in list(model.module.named_modules(remove_duplicate=False)):
            if module is layer:
                parent, _, child = place.rpartition(".")
                setattr(model.layer(parent), child, frozen)
