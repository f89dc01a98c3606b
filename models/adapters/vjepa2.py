"""V-JEPA 2: joint space-time recognisers with rotary positions and an attentive pooler.

Source: Assran et al., 2025, arXiv:2506.09985, as the library transformers builds its recogniser.
It holds the predictor of the pre-training too, which never runs and is taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.configuration import build_with, clip_of, edges_of, labels_of
from vcompress.models.checkpoint import load_state
from vcompress.models.video import TokenGrid
from vcompress.spec.errors import InputError

__all__ = ["VJEPA2"]

_RECOGNISER = "VJEPA2ForVideoClassification"
_PREDICTOR = "vjepa2.predictor."
# Of its processor; the means and deviations of ImageNet.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _describe(config: Mapping[str, Any]) -> Description:
    num_frames = int(config.get("frames_per_clip", 64))
    crop_size = config.get("crop_size", 256)
    height, width = edges_of(crop_size)
    patch_height, patch_width = edges_of(config.get("patch_size", 16))
    grid = TokenGrid(
        # Of a clip shorter than a tubelet, the model repeats the frames.
        frames=max(1, num_frames // int(config.get("tubelet_size", 2))),
        height=height // patch_height,
        width=width // patch_width,
        stem="vjepa2.encoder.layer",
        readers=("pooler",),
        rotary=True,
    )
    clip = clip_of({"num_channels": config.get("in_chans", 3)}, num_frames, crop_size)
    if clip.channels == len(_MEAN):
        clip = replace(clip, mean=_MEAN, std=_STD)
    return Description(
        task="classify",
        clip=clip,
        token_grid=grid,
        labels=labels_of(config),
        pooling="attention",
    )


def _adopt(
    module: nn.Module, config: Mapping[str, Any], _processor: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    found = type(module).__name__
    if found != _RECOGNISER:
        message = (
            f"a vjepa2 directory must hold a {_RECOGNISER}, got a {found}, which has a predictor "
            "in place of a head; give a fine-tuned recogniser, or a module of your own around the "
            "encoder as module:callable with --input-spec"
        )
        raise InputError(message)
    return _without_predictor(module), config


def _build(config: Mapping[str, Any]) -> nn.Module:
    return _without_predictor(build_with("VJEPA2Config", _RECOGNISER, config))


def _load(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], where: str
) -> nn.Module:
    module = _build(config)
    kept = {name: part for name, part in state_dict.items() if not name.startswith(_PREDICTOR)}
    load_state(module, kept, where)
    return module


def _without_predictor(module: nn.Module) -> nn.Module:
    """`module` without the weights that no clip ever meets, which would count as its size."""
    module.get_submodule("vjepa2").predictor = nn.Identity()
    return module


VJEPA2 = Adapter(
    family="vjepa2",
    build=_build,
    describe=_describe,
    load=_load,
    adopt=_adopt,
)
