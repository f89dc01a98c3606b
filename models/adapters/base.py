"""What a family adapter provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.models.video import Pooling, Task, TokenGrid
from vcompress.spec.clip import ClipSpec

__all__ = ["Adapter", "Description"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a configuration tells of a model."""

    task: Task
    clip: ClipSpec
    token_grid: TokenGrid | None
    labels: tuple[str, ...]
    pooling: Pooling | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How one family is built and described.

    Attributes:
        family: as it stands in checkpoints and manifests; transformers' `model_type` where there
            is one.
        build: an untrained module from a configuration.
        describe: what the configuration tells.
        load: a module with the weights of a state dict, from its configuration, the state dict and
            where it comes from; None if its names are those of what `build` returns.
        adopt: what `build` would have returned and its configuration, from the module that
            transformers read from a directory, the directory's configuration and its processor's
            (empty if there is none); None if the module can stay as it is.
    """

    family: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    describe: Callable[[Mapping[str, Any]], Description]
    load: Callable[[Mapping[str, Any], Mapping[str, torch.Tensor], str], nn.Module] | None = None
    adopt: (
        Callable[
            [nn.Module, Mapping[str, Any], Mapping[str, Any]],
            tuple[nn.Module, Mapping[str, Any]],
        ]
        | None
    ) = None
