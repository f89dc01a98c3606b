"""What a family adapter provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """

    family: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    describe: Callable[[Mapping[str, Any]], Description]
