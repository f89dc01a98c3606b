"""VideoMAE and ViViT: the joint space-time recognisers of the library transformers.

Sources: VideoMAE (Tong et al., 2022, arXiv:2203.12602), ViViT (Arnab et al., 2021,
arXiv:2103.15691, the joint model 1). Both take clips as `[B, T, C, H, W]` and hand their attention
to transformers' `AttentionInterface`, which token merging relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.video import TokenGrid
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["VIDEOMAE", "VIVIT"]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = (
            "this family is built with the package transformers, which is missing: "
            "pip install 'vcompress-ai[hf]'"
        )
        raise MissingCapabilityError(message) from error
    return transformers


def _build_with(config_class: str, model_class: str, config: Mapping[str, Any]) -> nn.Module:
    library = _transformers()
    try:
        parsed = getattr(library, config_class)(**config)
        module: nn.Module = getattr(library, model_class)(parsed)
    except Exception as error:
        # The library checks some values itself and stumbles over others, each in its own way.
        message = f"the configuration does not make a {model_class}: {error}"
        raise InputError(message) from error
    return module.eval()


def _edge(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _clip(config: Mapping[str, Any], num_frames: int) -> ClipSpec:
    height, width = _edge(config.get("image_size", 224))
    return ClipSpec(
        num_frames=num_frames,
        height=height,
        width=width,
        channels=int(config.get("num_channels", 3)),
        layout="NTCHW",
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _describe_videomae(config: Mapping[str, Any]) -> Description:
    num_frames = int(config.get("num_frames", 16))
    height, width = _edge(config.get("image_size", 224))
    patch_height, patch_width = _edge(config.get("patch_size", 16))
    grid = TokenGrid(
        frames=num_frames // int(config.get("tubelet_size", 2)),
        height=height // patch_height,
        width=width // patch_width,
    )
    return Description(
        task="classify",
        clip=_clip(config, num_frames),
        token_grid=grid,
        labels=_labels(config),
        # Without mean pooling the first patch token is read; merging may move it.
        pooling="mean" if config.get("use_mean_pooling", True) else None,
    )


def _describe_vivit(config: Mapping[str, Any]) -> Description:
    num_frames = int(config.get("num_frames", 32))
    height, width = _edge(config.get("image_size", 224))
    tubelet = [int(size) for size in config.get("tubelet_size", (2, 16, 16))]
    grid = TokenGrid(
        frames=num_frames // tubelet[0],
        height=height // tubelet[1],
        width=width // tubelet[2],
        special=1,
    )
    return Description(
        task="classify",
        clip=_clip(config, num_frames),
        token_grid=grid,
        labels=_labels(config),
        pooling="class_token",
    )


VIDEOMAE = Adapter(
    family="videomae",
    build=lambda config: _build_with("VideoMAEConfig", "VideoMAEForVideoClassification", config),
    describe=_describe_videomae,
)
VIVIT = Adapter(
    family="vivit",
    build=lambda config: _build_with("VivitConfig", "VivitForVideoClassification", config),
    describe=_describe_vivit,
)
