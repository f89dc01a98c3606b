"""Load a model directory as transformers or diffusers saved it. No network, no remote code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from vcompress.models.empty import empty_module, fill_module, read_weights
from vcompress.spec import strict_json
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["clip_from_processor", "read_directory", "read_processor"]

_AUTO_CLASSES = ("AutoModelForVideoClassification", "AutoModelForImageClassification", "AutoModel")
_PROCESSORS = (
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_PROCESSOR_WORDS = frozenset(
    {"do_rescale", "do_normalize", "image_mean", "image_std", "offset", "crop_size", "size"}
)
# What only pre-training runs; fine-tuned models may come without.
_PRETRAINING_PARTS = frozenset({"predictor", "mask_token"})
# Of models of pictures and texts, the part that sees.
_VISION_PARTS: Mapping[str, str] = MappingProxyType({
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "VideoPrismClipModel": "VideoPrismVideoModel",
})  # fmt: skip
# How names of weights begin in the whole and in the part, where the library does not know it.
_PREFIXES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"VideoPrismVideoModel": {r"^video_model\.": ""}}
)


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
    parts = [_VISION_PARTS.get(str(name)) for name in config.get("architectures") or ()]
    if parts and parts[0] is not None:
        return _read_vision_part(path, config, parts[0])
    return _read_transformers(path, config), str(config["model_type"]), config


def _read_diffusers(path: Path, config: Mapping[str, Any]) -> nn.Module:
    module = empty_module(config)
    fill_module(module, read_weights(path), str(path))
    return module


def _read_transformers(path: Path, config: Mapping[str, Any]) -> nn.Module:
    transformers = _transformers()
    names = [str(name) for name in config.get("architectures") or ()] + list(_AUTO_CLASSES)
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not classes:
        message = f"transformers {transformers.__version__} has none of: {', '.join(names)}"
        raise InputError(message)
    return _loaded(classes[0], path, {"local_files_only": True, "trust_remote_code": False})


def _read_vision_part(
    path: Path, config: Mapping[str, Any], name: str
) -> tuple[nn.Module, str, dict[str, Any]]:
    """One tower out of a directory that holds two, as if it had been saved alone."""
    library = _transformers()
    cls = getattr(library, name)
    try:
        vision = dict(config.get("vision_config") or {})
        if "projection_dim" in config:
            # The tower's own entry is not kept up to date.
            vision["projection_dim"] = config["projection_dim"]
        parsed = cls.config_class.from_dict(vision)
    except Exception as error:
        message = f"{path}: vision_config in config.json does not make a {name}: {error}"
        raise InputError(message) from error
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    try:
        # The library would list all weights of the other tower as unexpected.
        options = {"local_files_only": True, "config": parsed}
        if name in _PREFIXES:
            options["key_mapping"] = dict(_PREFIXES[name])
        module = _loaded(cls, path, options)
    finally:
        library.logging.set_verbosity(verbosity)
    described = {**parsed.to_dict(), "architectures": [name]}
    if "num_frames" in config:
        described["num_frames"] = config["num_frames"]
    return module, str(parsed.model_type), described


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        message = "this is a transformers model: pip install 'vcompress-ai[hf]'"
        raise MissingCapabilityError(message) from error
    return transformers


def _loaded(cls: Any, path: Path, options: dict[str, Any]) -> nn.Module:
    module: nn.Module
    try:
        with _without_bars(cls):
            module, found = cls.from_pretrained(str(path), output_loading_info=True, **options)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        message = f"{path}: {cls.__name__} cannot be loaded: {type(error).__name__}: {first}"
        raise InputError(message) from error
    missing = sorted(
        name for name in found["missing_keys"] if not _PRETRAINING_PARTS & set(name.split("."))
    )
    if missing:
        # The libraries fill these with random numbers.
        message = (
            f"{path} lacks {len(missing)} weights of {cls.__name__}, the first is {missing[0]}; "
            "give a directory that was saved from this class"
        )
        raise InputError(message)
    return module.eval()


@contextmanager
def _without_bars(cls: type) -> Iterator[None]:
    """Progress is ours to show: the library of `cls` draws no bar of its own."""
    logging = import_module(f"{cls.__module__.partition('.')[0]}.utils.logging")
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def read_processor(path: Path) -> dict[str, Any]:
    """What a directory says of how frames become the model's input; empty if it says nothing."""
    for name in _PROCESSORS:
        if (path / name).is_file():
            data = strict_json.read(path / name)
            if not isinstance(data, dict):
                message = f"{path / name} must hold an object"
                raise InputError(message)
            # A processor of texts too keeps that of pictures within.
            parts = [data, *(data.get(key) for key in ("video_processor", "image_processor"))]
            for part in parts:
                if isinstance(part, dict) and _PROCESSOR_WORDS & part.keys():
                    return part
    return {}


def clip_from_processor(path: Path, clip: ClipSpec) -> ClipSpec:
    """`clip` with the normalisation of the directory's processor file, where there is one."""
    data = read_processor(path)
    if not data:
        return clip
    rescale = float(data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 1.0
    clip = replace(clip, rescale=rescale)
    # ViViT's processor takes 1 away after rescaling, before the mean.
    offset = 1.0 if data.get("offset") and data.get("do_rescale", True) else 0.0
    mean, std = clip.mean, clip.std
    if not data.get("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    elif data.get("image_mean") and data.get("image_std"):
        mean, std = tuple(data["image_mean"]), tuple(data["image_std"])
    return replace(clip, mean=tuple(value + offset for value in mean), std=std)
