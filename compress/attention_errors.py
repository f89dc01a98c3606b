"""How far attentions in eight bits are from exact ones: of their own output, of their block's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vcompress.compress.attention_products import AttentionProducts, attend_plainly
from vcompress.compress.attention_sites import attention_applied, intercepted, sdpa_form
from vcompress.compress.block_error import recorded_inputs
from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel, primary_output
from vcompress.spec.attention_section import AttentionChoice

__all__ = ["OutputErrors", "output_errors", "with_block_errors"]

# Attention and the form that its products take -> relative L2 error of its output.
OutputErrors = Mapping[tuple[str, AttentionChoice], float]


def output_errors(
    model: VideoModel, candidates: Mapping[str, Sequence[AttentionChoice]], clips: Batch
) -> OutputErrors:
    """Relative L2 error of each attention's output in each form; of those that `clips` reach."""
    forms = {
        name: [(choice, AttentionProducts(choice)) for choice in choices]
        for name, choices in candidates.items()
    }
    sums: dict[tuple[str, AttentionChoice], list[float]] = {}

    def compare(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        exact = attend_plainly(*args, **kwargs)
        for choice, products in forms.get(name, ()):
            error = products.to(exact.device)(*args, **kwargs).double() - exact.double()
            pair = sums.setdefault((name, choice), [0.0, 0.0])
            pair[0] += float(error.square().sum())
            pair[1] += float(exact.double().square().sum())
        return exact

    with sdpa_form(model.module), intercepted(model.module, compare):
        model(clips)
    return {
        key: math.sqrt(error / size) if size > 0 else math.sqrt(error)
        for key, (error, size) in sums.items()
    }


@torch.inference_mode()
def with_block_errors(
    model: VideoModel, choices: Mapping[str, Sequence[AttentionChoice]], clips: Batch,
    advance: Callable[[int], None],
) -> dict[str, list[AttentionChoice]]:  # fmt: skip
    """`choices` with the error of the enclosing block's output as their score."""
    scopes = {name: _scope(model, name) for name in choices}
    with sdpa_form(model.module):
        calls = recorded_inputs(model, set(scopes.values()), clips)
        exact = {
            scope: primary_output(model.layer(scope)(*call.arguments, **call.keywords)).float()
            for scope, call in calls.items()
        }
    scored: dict[str, list[AttentionChoice]] = {}
    for name, each in choices.items():
        scope = scopes[name]
        call = calls[scope]
        for choice in each:
            with attention_applied(model.module, {name: choice}):
                output = model.layer(scope)(*call.arguments, **call.keywords)
            error = torch.linalg.vector_norm(primary_output(output).float() - exact[scope])
            size = torch.linalg.vector_norm(exact[scope])
            score = float(error / size) if size > 0 else float(error)
            scored.setdefault(name, []).append(replace(choice, score=score))
        advance(1)
    return scored


def _scope(model: VideoModel, name: str) -> str:
    """The block that encloses the attention, or the attention itself."""
    if name in model.blocks:
        return name
    return model.block_of(name) or name
