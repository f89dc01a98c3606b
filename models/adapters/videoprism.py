"""VideoPrism: factorised encoders, a spatial tower over each frame, then a temporal one.

Source: Zhao et al., 2024, arXiv:2402.13217, as the library transformers builds it: recognisers,
video encoders with an attention pooling head (of the video and text model, the part that sees), and
bare encoders, whose output is all of their tokens. Takes clips as `[B, T, C, H, W]`, scaled to
0..1 and not normalised.

Shapes: B clips, T frames, L places, C width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.configuration import build_with, clip_of, edges_of, labels_of
from vcompress.models.video import Pooling, Task, TokenGrid
from vcompress.spec.errors import InputError

__all__ = ["VIDEOPRISM"]

_RECOGNISER, _EMBEDDER = "VideoPrismForVideoClassification", "VideoPrismVideoModel"


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One of the model classes.

    Attributes:
        encoder: where its spatial and temporal layers stand.
        readers: what attends to the tokens of all frames.
    """

    task: Task
    encoder: str
    readers: tuple[str, ...]
    pooling: Pooling | None


_KINDS: Mapping[str, _Kind] = MappingProxyType({
    _RECOGNISER: _Kind(
        task="classify", encoder="vision_model.", readers=("head",), pooling="attention"
    ),
    _EMBEDDER: _Kind(
        task="embed", encoder="vision_model.", readers=("auxiliary_layers", "head"),
        pooling="attention",
    ),
    "VideoPrismVisionModel": _Kind(task="embed", encoder="", readers=(), pooling=None),
})  # fmt: skip


# Objects, not closures: a deep copy of the model copies them.
@dataclass(frozen=True)
class _WithoutQueries:
    """The head pools with one query, whose axis would stand in the output: `[B, 1, C]`."""

    def __call__(self, _norm: nn.Module, _inputs: tuple[Any, ...], pooled: Any) -> torch.Tensor:
        vector: torch.Tensor = pooled[:, 0]
        return vector


@dataclass(frozen=True)
class _OnlyTheEmbedding:
    """A video encoder returns its tokens first, and what it is used for after them."""

    def __call__(self, _model: nn.Module, _inputs: tuple[Any, ...], output: Any) -> torch.Tensor:
        embedding: torch.Tensor = output.pooler_output
        return embedding


def _class_of(config: Mapping[str, Any]) -> str:
    names = [str(name) for name in config.get("architectures") or ()]
    return next((name for name in names if name in _KINDS), _RECOGNISER)


def _with_one_vector(module: nn.Module) -> nn.Module:
    """`module`, whose output is `[B, K]` or `[B, C]` if it has a pooling head."""
    norm = getattr(module, "head_layernorm", None)
    if norm is not None:
        norm.register_forward_hook(_WithoutQueries())
        if type(module).__name__ == _EMBEDDER:
            module.register_forward_hook(_OnlyTheEmbedding())
    return module


def _adopt(
    module: nn.Module, config: Mapping[str, Any], _processor: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    found = type(module).__name__
    if found not in _KINDS:
        message = (
            f"a {VIDEOPRISM.family} directory must hold a {', a '.join(_KINDS)}, got a {found}; "
            "save one of these with save_pretrained"
        )
        raise InputError(message)
    return _with_one_vector(module), {**config, "architectures": [found]}


def _describe(config: Mapping[str, Any]) -> Description:
    kind = _KINDS[_class_of(config)]
    num_frames = int(config.get("num_frames", 16))
    image_size = config.get("image_size", 288)
    height, width = edges_of(image_size)
    tubelet = [int(size) for size in config.get("tubelet_size", (1, 18, 18))]
    grid = TokenGrid(
        frames=num_frames // tubelet[0],
        height=height // tubelet[1],
        width=width // tubelet[2],
        arrangement="tubes",
        stem=f"{kind.encoder}spatial_layers",
        readers=kind.readers,
    )
    return Description(
        task=kind.task,
        clip=clip_of(config, num_frames, image_size),
        token_grid=grid,
        labels=labels_of(config) if kind.task == "classify" else (),
        pooling=kind.pooling,
    )


VIDEOPRISM = Adapter(
    family="videoprism_vision_model",
    build=lambda config: _with_one_vector(
        build_with("VideoPrismVisionConfig", _class_of(config), config)
    ),
    describe=_describe,
    adopt=_adopt,
)
