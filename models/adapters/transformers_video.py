"""VideoMAE and ViViT: the joint space-time recognisers of the library transformers.

Sources: VideoMAE (Tong et al., 2022, arXiv:2203.12602), ViViT (Arnab et al., 2021,
arXiv:2103.15691, the joint model 1). Both take clips as `[B, T, C, H, W]` and hand their attention
to transformers' `AttentionInterface`, which token merging relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.configuration import build_with, clip_of, edges_of, labels_of
from vcompress.models.video import TokenGrid

__all__ = ["VIDEOMAE", "VIVIT"]


def _describe_videomae(config: Mapping[str, Any]) -> Description:
    num_frames = int(config.get("num_frames", 16))
    image_size = config.get("image_size", 224)
    height, width = edges_of(image_size)
    patch_height, patch_width = edges_of(config.get("patch_size", 16))
    grid = TokenGrid(
        frames=num_frames // int(config.get("tubelet_size", 2)),
        height=height // patch_height,
        width=width // patch_width,
    )
    return Description(
        task="classify",
        clip=clip_of(config, num_frames, image_size),
        token_grid=grid,
        labels=labels_of(config),
        # Without mean pooling the first patch token is read; merging may move it.
        pooling="mean" if config.get("use_mean_pooling", True) else None,
    )


def _describe_vivit(config: Mapping[str, Any]) -> Description:
    num_frames = int(config.get("num_frames", 32))
    image_size = config.get("image_size", 224)
    height, width = edges_of(image_size)
    tubelet = [int(size) for size in config.get("tubelet_size", (2, 16, 16))]
    grid = TokenGrid(
        frames=num_frames // tubelet[0],
        height=height // tubelet[1],
        width=width // tubelet[2],
        special=1,
    )
    return Description(
        task="classify",
        clip=clip_of(config, num_frames, image_size),
        token_grid=grid,
        labels=labels_of(config),
        pooling="class_token",
    )


VIDEOMAE = Adapter(
    family="videomae",
    build=lambda config: build_with("VideoMAEConfig", "VideoMAEForVideoClassification", config),
    describe=_describe_videomae,
)
VIVIT = Adapter(
    family="vivit",
    build=lambda config: build_with("VivitConfig", "VivitForVideoClassification", config),
    describe=_describe_vivit,
)
