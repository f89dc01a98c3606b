"""Load a model directory as transformers or diffusers saved it. No network, no remote code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vcompress.spec import strict_json
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["clip_from_processor", "read_directory"]

_AUTO_CLASSES = ("AutoModelForVideoClassification", "AutoModelForImageClassification", "AutoModel")


def read_directory(path: Path) -> tuple[nn.Module, str, dict[str, Any]]:
    """The module, its family (`model_type` or the diffusers class) and its configuration."""
    config_path = path / "config.json"
    if not config_path.is_file():
        message = (
            f"{path} has no config.json; give a directory saved by save_pretrained of transformers "
            "or of a diffusers transformer, or a .pt or .safetensors file"
        )
        raise InputError(message)
    config = strict_json.read(config_path)
    if not isinstance(config, dict):
        message = f"{config_path} must hold an object"
        raise InputError(message)
    if "_class_name" in config:
        return _read_diffusers(path, config), str(config["_class_name"]), config
    if "model_type" not in config:
        message = (
            f"{config_path} names neither model_type (transformers) nor _class_name (diffusers)"
        )
        raise InputError(message)
    return _read_transformers(path, config), str(config["model_type"]), config


def _read_diffusers(path: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        message = "this is a diffusers model: pip install 'vcompress-ai[hf]'"
        raise MissingCapabilityError(message) from error
    cls = getattr(diffusers, str(config["_class_name"]), None)
    if cls is None:
        message = f"diffusers {diffusers.__version__} has no class {config['_class_name']}"
        raise InputError(message)
    return _loaded(cls, path, {"local_files_only": True})


def _read_transformers(path: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        message = "this is a transformers model: pip install 'vcompress-ai[hf]'"
        raise MissingCapabilityError(message) from error
    names = [str(name) for name in config.get("architectures") or ()] + list(_AUTO_CLASSES)
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not classes:
        message = f"transformers {transformers.__version__} has none of: {', '.join(names)}"
        raise InputError(message)
    return _loaded(classes[0], path, {"local_files_only": True, "trust_remote_code": False})


def _loaded(cls: Any, path: Path, options: dict[str, Any]) -> nn.Module:
    try:
        module: nn.Module = cls.from_pretrained(str(path), **options)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        message = f"{path}: {cls.__name__} cannot be loaded: {type(error).__name__}: {first}"
        raise InputError(message) from error
    return module.eval()


def clip_from_processor(path: Path, clip: ClipSpec) -> ClipSpec:
    """`clip` with the normalisation of the directory's processor file, where there is one."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            data = strict_json.read(path / name)
            rescale = (
                float(data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 1.0
            )
            clip = replace(clip, rescale=rescale)
            # ViViT's processor takes 1 away after rescaling, before the mean.
            offset = 1.0 if data.get("offset") and data.get("do_rescale", True) else 0.0
            if data.get("do_normalize", True) and data.get("image_mean") and data.get("image_std"):
                mean = tuple(value + offset for value in data["image_mean"])
                return replace(clip, mean=mean, std=tuple(data["image_std"]))
            return replace(clip, mean=(offset,))
    return clip
