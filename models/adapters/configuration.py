"""What the adapters of transformers models have in common: building one, reading its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["build_with", "clip_of", "edges_of", "labels_of"]


def build_with(config_class: str, model_class: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained model of the library transformers, in evaluation mode.

    Raises:
        InputError: the configuration does not make one.
        MissingCapabilityError: transformers is not installed.
    """
    library = _transformers()
    try:
        parsed = getattr(library, config_class)(**config)
        module: nn.Module = getattr(library, model_class)(parsed)
    except Exception as error:
        # The library checks some values itself and stumbles over others, each in its own way.
        message = f"the configuration does not make a {model_class}: {error}"
        raise InputError(message) from error
    return module.eval()


def edges_of(size: Any) -> tuple[int, int]:
    """Height and width, from one number for both or from two."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def clip_of(config: Mapping[str, Any], num_frames: int, image_size: Any) -> ClipSpec:
    """A clip `[T, C, H, W]` of `num_frames` frames of `image_size`."""
    height, width = edges_of(image_size)
    return ClipSpec(
        num_frames=num_frames,
        height=height,
        width=width,
        channels=int(config.get("num_channels", 3)),
        layout="NTCHW",
    )


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, in their order; none if the configuration has none."""
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


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
