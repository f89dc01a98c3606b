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

A trained classifier is unsure between few classes: most of its Hessian lies along one direction.
`probes` gives this direction to the first probe and leaves the rest to chance, which estimates the
same loss with less variance; the split is exact whatever direction is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from vcompress.models.video import Task

__all__ = ["LossName", "TaskLoss", "loss_of"]

_POWER_ITERATIONS = 8

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
            return _FisherRoot(reference.float().softmax(-1)).times(noise)
        size = _no_zero(reference.float().flatten(1).square().sum(1)).sqrt()
        return noise / size.view(-1, *[1] * (reference.ndim - 1))

    def probes(
        self, reference: torch.Tensor, count: int, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """`count` probes whose squares have the loss as their *mean*, as those of `probe` have."""
        if self.name != "kl_nats" or count < 2:
            return [self.probe(reference, generator) for _ in range(count)]
        root = _FisherRoot(reference.float().softmax(-1))
        direction = root.principal()
        # A position of its own sign: what crosses positions cancels in the mean.
        signs = torch.randint(0, 2, reference.shape[:-1], generator=generator) * 2.0 - 1
        first = root.times(direction * signs.to(reference.device).unsqueeze(-1))
        found = [first * math.sqrt(count)]
        for _ in range(count - 1):
            noise = torch.randn(reference.shape, generator=generator).to(reference.device)
            noise -= direction * (direction * noise).sum(-1, keepdim=True)
            found.append(root.times(noise) * math.sqrt(count / (count - 1)))
        return found

    def curvature(self, reference: torch.Tensor) -> torch.Tensor:
        """Trace of half the Hessian of each clip, `[B]`: how easily its loss grows."""
        if self.name != "kl_nats":
            return torch.ones(len(reference))
        uncertain = 1 - reference.float().softmax(-1).square().sum(-1)
        return uncertain.reshape(len(uncertain), -1).mean(1).cpu() / 2


@dataclass(frozen=True, eq=False)
class _FisherRoot:
    """R with R R' = half the Hessian of KL in the logits, at each position.

    Attributes:
        probabilities: `[B, ..., classes]`.
    """

    probabilities: torch.Tensor

    def times(self, z: torch.Tensor) -> torch.Tensor:
        """R z."""
        root = self.probabilities.sqrt()
        centred = root * z - self.probabilities * (root * z).sum(-1, keepdim=True)
        return centred / math.sqrt(2 * max(1, math.prod(z.shape[1:-1])))

    def principal(self) -> torch.Tensor:
        """About the z of length 1 for which R z is longest; zeros where R is zero."""
        root = self.probabilities.sqrt()
        likeliest = self.probabilities.argmax(-1, keepdim=True)
        z = torch.zeros_like(root).scatter_(-1, likeliest, 1.0)
        for _ in range(_POWER_ITERATIONS):
            y = self.times(z)
            z = root * (y - (self.probabilities * y).sum(-1, keepdim=True))
            z = z / _no_zero(torch.linalg.vector_norm(z, dim=-1, keepdim=True))
        return z


def _no_zero(size: torch.Tensor) -> torch.Tensor:
    """1 for a zero: an output of zeros is judged by the absolute error."""
    return torch.where(size > 0, size, torch.ones_like(size))


def loss_of(task: Task) -> TaskLoss:
    """The loss for models of `task`."""
    return TaskLoss("kl_nats" if task == "classify" else "squared_relative_error")
