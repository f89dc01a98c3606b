"""Refit the last linear of a classifier to what reduction does to its features.

What: merging shifts the features that the classifier was trained on, in much the same way for all
clips. Ridge regression from the features with reduction to the logits without gives the weights
that undo what a linear map can undo; it needs the calibration clips' outputs, not their labels.
Source: ours; ridge regression is Hoerl and Kennard (1970). What we changed: the penalty draws the
weights towards the trained ones instead of towards zero, so that few clips change little.

The penalty is chosen by cross-validation on the loss of the task, and without a gain there nothing
is refitted.

Shapes: M clips, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.compress.losses import TaskLoss
from vcompress.compress.tensors import LayerTensors
from vcompress.models.video import VideoModel, primary_output
from vcompress.spec.errors import InputError

__all__ = [
    "NUM_FOLDS", "Features", "apply_readout", "cross_fitted", "fit_readout", "readout_of",
    "run_with_features",
]  # fmt: skip

WEIGHT, BIAS = "readout_weight", "readout_bias"
NUM_FOLDS = 4
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
# What the refitted readout must gain on clips that it was not fitted to.
_WORTH_KEEPING = 0.98


@dataclass(frozen=True)
class Features:
    """What the readout saw and what came out: `[M, D]` and `[M, K]`."""

    inputs: torch.Tensor
    outputs: torch.Tensor


def readout_of(model: VideoModel) -> str | None:
    """Full name of the linear whose output is the class scores; None if there is none."""
    if model.task != "classify":
        return None
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.layer(name).register_forward_hook(_Keeper(seen, name))
        for name, facts in model.layers.items()
        if facts.kind == "linear" and model.block_of(name) is None
    ]
    try:
        with torch.inference_mode():
            scores = primary_output(model.module(model.example()))
    finally:
        for handle in handles:
            handle.remove()
    names = [
        name
        for name, output in seen.items()
        if output.shape == scores.shape and output.data_ptr() == scores.data_ptr()
    ]
    return names[0] if len(names) == 1 and scores.ndim == 2 else None


@dataclass
class _Keeper:
    seen: dict[str, torch.Tensor]
    name: str

    def __call__(self, _layer: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.seen[self.name] = output


def run_with_features(model: VideoModel, batches: Sequence[torch.Tensor], readout: str) -> Features:
    """Run `model` on `batches` and keep what enters the layer `readout`."""
    inputs: list[torch.Tensor] = []
    handle = model.layer(readout).register_forward_pre_hook(
        lambda _layer, arguments: inputs.append(arguments[0].flatten(1))
    )
    try:
        outputs = [model(batch) for batch in batches]
    finally:
        handle.remove()
    return Features(torch.cat(inputs), torch.cat(outputs))


def cross_fitted(
    features: Features, references: torch.Tensor, weight: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Outputs `[M, K]` of a refitted readout, each from a fit to the other folds' clips.

    Args:
        features: of the reduced model.
        references: outputs of the model without reduction, `[M, K]`.
        weight: of the trained readout, `[K, D]`.
        penalty: of the change of the weights, relative to the features' mean variance.
    """
    outputs = torch.empty_like(references)
    fold = torch.arange(len(references)) % NUM_FOLDS
    for held in range(NUM_FOLDS):
        own, others = fold == held, fold != held
        fitted, bias = _ridge(features.inputs[others], references[others], weight, penalty)
        outputs[own] = (features.inputs[own].double() @ fitted.T + bias).to(references.dtype)
    return outputs


def fit_readout(
    features: Features, references: torch.Tensor, layer: nn.Linear, loss: TaskLoss
) -> LayerTensors | None:
    """New weight and bias of the readout `layer`, or None where nothing is gained.

    Args:
        features: of the reduced model on the calibration clips.
        references: outputs of the model without reduction on the same clips, `[M, K]`.
        layer: the trained readout.
        loss: that decides.
    """
    if len(references) < 2 * NUM_FOLDS:
        return None
    trained = layer.weight.detach()
    losses = {
        penalty: float(
            loss.values(references, cross_fitted(features, references, trained, penalty)).mean()
        )
        for penalty in _PENALTIES
    }
    best = min(losses, key=losses.__getitem__)
    if not losses[best] < _WORTH_KEEPING * float(loss.values(references, features.outputs).mean()):
        return None
    weight, bias = _ridge(features.inputs, references, trained, best)
    return {WEIGHT: weight.float(), BIAS: bias.float()}


def apply_readout(model: VideoModel, readout: str, tensors: LayerTensors) -> None:
    """Give the layer `readout` of `model.module` its new weights, in place.

    Raises:
        InputError: they are missing, or of another shape.
    """
    layer = model.layer(readout)
    assert isinstance(layer, nn.Linear)
    weight, bias = tensors.get(WEIGHT), tensors.get(BIAS)
    if weight is None or bias is None or weight.shape != layer.weight.shape:
        message = (
            f"tokens.readout: the tensors file has no weights that fit {readout}; set it to null, "
            "or make the plan again"
        )
        raise InputError(message)
    layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)


def _ridge(
    inputs: torch.Tensor, references: torch.Tensor, weight: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[K, D]` and bias `[K]`, float64, from inputs `[M, D]` to references `[M, K]`."""
    features, targets, trained = inputs.double(), references.double(), weight.double()
    mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - mean
    missing = (targets - target_mean) - centred @ trained.T
    moment = centred.T @ centred / len(centred)
    moment += penalty * moment.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moment))
    change = torch.linalg.solve(moment, centred.T @ missing / len(centred))
    fitted = trained + change.T
    return fitted, target_mean - fitted @ mean
