"""What compression costs a model, by its task; and probes that feel this cost before it is paid.

A loss compares the output of the compressed model with that of the original, clip by clip; labels
are not needed. It is zero for equal outputs and quadratic close to them:

    loss(y + d) = E[(v . d)^2] + O(|d|^3)

for random vectors v with E[v v'] = half the Hessian of the loss at d = 0. Such a v is a probe: one
backward pass with it tells for every activation how far a change of it moves the loss.

- A classifier is judged by KL(p || q) of its class probabilities, in nats. Half its Hessian in the
  logits is half the Fisher information (diag(p) - p p'), so that v = (diag(sqrt p) - p sqrt(p)') z
  / sqrt 2 with z standard normal. Source: Amari, "Natural Gradient Works Efficiently in Learning"
  (1998), for the Fisher information as the curvature of KL.
- Everything else is judged by its squared relative error |d|^2 / |y|^2, for which v = z / |y|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vcompress.models.video import Task

__all__ = ["TaskLoss", "loss_of"]

LossName = Literal["kl_nats", "squared_relative_error"]


@dataclass(frozen=True)
class TaskLoss:
    """A loss by name; see the module.

    Outputs are `[B, ...]`; a classifier's end with the axis of classes, other axes (frames of a
    sequence) are averaged.
    """

    name: LossName

    def values(self, reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Loss of each clip, float32 `[B]`; not finite where `output` is not."""
        if self.name == "kl_nats":
            ours = reference.double().log_softmax(-1)
            theirs = output.double().log_softmax(-1)
            divergence = (ours.exp() * (ours - theirs)).sum(-1)
            return divergence.reshape(len(divergence), -1).mean(1).float()
        difference = (output.double() - reference.double()).flatten(1)
        size = reference.double().flatten(1).square().sum(1)
        return (difference.square().sum(1) / _no_zero(size)).float()

    def probe(self, reference: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One random probe for each clip of `reference`; same shape, float32."""
        noise = torch.randn(reference.shape, generator=generator).to(reference.device)
        if self.name == "kl_nats":
            probabilities = reference.float().softmax(-1)
            root = probabilities.sqrt()
            centred = root * noise - probabilities * (root * noise).sum(-1, keepdim=True)
            num_positions = max(1, math.prod(centred.shape[1:-1]))
            return centred / math.sqrt(2 * num_positions)
        size = _no_zero(reference.float().flatten(1).square().sum(1)).sqrt()
        return noise / size.view(-1, *[1] * (reference.ndim - 1))


def _no_zero(size: torch.Tensor) -> torch.Tensor:
    """1 for a zero: an output of zeros is judged by the absolute error."""
    return torch.where(size > 0, size, torch.ones_like(size))


def loss_of(task: Task) -> TaskLoss:
    """The loss for models of `task`."""
    return TaskLoss("kl_nats" if task == "classify" else "squared_relative_error")
