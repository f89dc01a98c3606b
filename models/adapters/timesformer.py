"""TimeSformer: divided and joint space-time recognisers of the library transformers.

Source: Bertasius et al., 2021, arXiv:2102.05095. Takes clips as `[B, T, C, H, W]`. Its tokens stand
places first. Its variant for single frames gives one output a frame and is no recogniser of clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.configuration import build_with, clip_of, edges_of, labels_of
from vcompress.models.video import Arrangement, TokenGrid
from vcompress.spec.errors import InputError

__all__ = ["TIMESFORMER"]

_RECOGNISER = "TimesformerForVideoClassification"
_ARRANGEMENTS: Mapping[str, Arrangement] = MappingProxyType(
    {"divided_space_time": "divided", "joint_space_time": "joint"}
)
# Of the recognisers that its authors published.
_MEAN, _STD = (0.45,), (0.225,)


def _describe(config: Mapping[str, Any]) -> Description:
    attention = str(config.get("attention_type", "divided_space_time"))
    if attention not in _ARRANGEMENTS:
        message = (
            f"attention_type of a TimeSformer must be one of {', '.join(_ARRANGEMENTS)}, got "
            f"{attention!r}; space_only gives one output for each frame, not for the clip"
        )
        raise InputError(message)
    num_frames = int(config.get("num_frames", 8))
    image_size = config.get("image_size", 224)
    height, width = edges_of(image_size)
    patch_height, patch_width = edges_of(config.get("patch_size", 16))
    grid = TokenGrid(
        frames=num_frames,
        height=height // patch_height,
        width=width // patch_width,
        special=1,
        arrangement=_ARRANGEMENTS[attention],
        stem="timesformer.encoder.layer",
    )
    return Description(
        task="classify",
        clip=replace(clip_of(config, num_frames, image_size), mean=_MEAN, std=_STD),
        token_grid=grid,
        labels=labels_of(config),
        pooling="class_token",
    )


def _adopt(
    module: nn.Module, config: Mapping[str, Any], _processor: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    found = type(module).__name__
    if found != _RECOGNISER:
        message = (
            f"a timesformer directory must hold a {_RECOGNISER}, got a {found}, which has no head; "
            "give a fine-tuned recogniser"
        )
        raise InputError(message)
    return module, config


TIMESFORMER = Adapter(
    family="timesformer",
    build=lambda config: build_with("TimesformerConfig", _RECOGNISER, config),
    describe=_describe,
    adopt=_adopt,
)
