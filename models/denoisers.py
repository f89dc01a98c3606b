"""Video diffusion transformers of the library diffusers: what they are called with.

Their structure is found by running them once, so one call is needed: the first of a file of
recorded calls, or, where none is at hand, one made up from the configuration of the classes below
in the smallest sizes that they take.

Sources: Wan (arXiv:2503.20314), CogVideoX (Yang et al., 2024, arXiv:2408.06072), LTX-Video (HaCohen
et al., 2024, arXiv:2501.00103), HunyuanVideo (Kong et al., 2024, arXiv:2412.03603), Mochi 1 (Genmo,
2024), Latte (Ma et al., 2024, arXiv:2401.03048).

Shapes: B = 1 sample, C channels, F frames, H x W places of the latents, L tokens of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vcompress.models.call_file import read_calls
from vcompress.models.calls import Call, as_computed, call_of
from vcompress.spec import strict_json
from vcompress.spec.errors import InputError

__all__ = ["EXAMPLES", "MODEL_INDEX", "example_call", "only_transformer", "transformers_of"]

MODEL_INDEX = "model_index.json"
_TIME = 500
_NUM_TEXT_TOKENS = 4


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text(config: Mapping[str, Any], key: str, count: int = _NUM_TEXT_TOKENS) -> torch.Tensor:
    return _noise(1, count, int(config[key]))


def _mask(count: int = _NUM_TEXT_TOKENS) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.int64)


def _wan(config: Mapping[str, Any]) -> dict[str, Any]:
    frames, height, width = (2 * int(size) for size in config["patch_size"])
    arguments = {
        "hidden_states": _noise(1, int(config["in_channels"]), frames, height, width),
        "timestep": torch.tensor([_TIME]),
        "encoder_hidden_states": _text(config, "text_dim"),
    }
    if config.get("image_dim") is not None:
        arguments["encoder_hidden_states_image"] = _text(config, "image_dim")
    return arguments


def _cogvideox(config: Mapping[str, Any]) -> dict[str, Any]:
    edge = 2 * int(config["patch_size"])
    frames = 2 * int(config.get("patch_size_t") or 1)
    arguments: dict[str, Any] = {
        "hidden_states": _noise(1, frames, int(config["in_channels"]), edge, edge),
        "encoder_hidden_states": _text(
            config, "text_embed_dim", int(config["max_text_seq_length"])
        ),
        "timestep": torch.tensor([_TIME]),
    }
    if config.get("ofs_embed_dim") is not None:
        arguments["ofs"] = torch.full((1,), 2.0)
    if config.get("use_rotary_positional_embeddings"):
        angles = _noise(8, int(config["attention_head_dim"]))
        arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
    return arguments


def _ltx(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 8, int(config["in_channels"])),
        "encoder_hidden_states": _text(config, "caption_channels"),
        "timestep": torch.tensor([float(_TIME)]),
        "encoder_attention_mask": _mask(),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "rope_interpolation_scale": (0.32, 32, 32),
    }


def _hunyuan(config: Mapping[str, Any]) -> dict[str, Any]:
    edge, frames = 2 * int(config["patch_size"]), 2 * int(config["patch_size_t"])
    arguments = {
        "hidden_states": _noise(1, int(config["in_channels"]), frames, edge, edge),
        "timestep": torch.tensor([_TIME]),
        "encoder_hidden_states": _text(config, "text_embed_dim"),
        "encoder_attention_mask": _mask(),
        "pooled_projections": _noise(1, int(config["pooled_projection_dim"])),
    }
    if config.get("guidance_embeds"):
        arguments["guidance"] = torch.tensor([6000.0])
    return arguments


def _mochi(config: Mapping[str, Any]) -> dict[str, Any]:
    edge = 2 * int(config["patch_size"])
    return {
        "hidden_states": _noise(1, int(config["in_channels"]), 2, edge, edge),
        "encoder_hidden_states": _text(config, "text_embed_dim"),
        "timestep": torch.tensor([_TIME]),
        "encoder_attention_mask": _mask().bool(),
    }


def _latte(config: Mapping[str, Any]) -> dict[str, Any]:
    edge = int(config["sample_size"])
    shape = (int(config["in_channels"]), int(config["video_length"]), edge, edge)
    arguments = {"hidden_states": _noise(1, *shape), "timestep": torch.tensor([_TIME])}
    if config.get("caption_channels") is not None:
        arguments["encoder_hidden_states"] = _text(config, "caption_channels")
    return arguments


# What the classes are called with, from their configurations.
EXAMPLES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = MappingProxyType({
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "MochiTransformer3DModel": _mochi,
    "LatteTransformer3DModel": _latte,
})  # fmt: skip


def example_call(family: str, config: Mapping[str, Any], calls: Path | None, where: str) -> Call:
    """One call, in float32, to run a module of the class `family` with.

    Args:
        config: as the module has it, defaults included.
        calls: a file of recorded calls, or None.
        where: the model is, for errors.

    Raises:
        InputError: the calls are of another class, or there are none and the class is unknown.
    """
    if calls is not None:
        found = read_calls(calls)
        if found.module_class != family:
            message = (
                f"{calls} holds calls of a {found.module_class}, {where} is a {family}; record "
                "calls of this model"
            )
            raise InputError(message)
        return as_computed(found.calls[0].call[:1])
    if family not in EXAMPLES:
        message = (
            f"{where}: what a {family} is called with is not known (known: "
            f"{', '.join(EXAMPLES)}); record some calls with vcompress.record_calls and name "
            "their file with --calib, or in Python with LoadOptions(calls=...)"
        )
        raise InputError(message)
    return call_of(EXAMPLES[family](config))


def transformers_of(path: Path) -> dict[str, str]:
    """Folder -> class of the transformers in the pipeline folder `path`, in its order."""
    index = strict_json.read(path / MODEL_INDEX)
    found = {}
    for name, entry in index.items() if isinstance(index, dict) else ():
        known = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        if known and name.startswith("transformer"):
            found[name] = str(entry[1])
    return found


def only_transformer(path: Path) -> Path:
    """The folder of the one transformer of the pipeline folder `path`.

    Raises:
        InputError: it has none, or several.
    """
    found = transformers_of(path)
    if len(found) == 1:
        return path / next(iter(found))
    if found:
        message = (
            f"{path} is a pipeline with several transformers; compress one after the other: "
            f"{' and '.join(str(path / name) for name in found)}"
        )
    else:
        message = f"{path} is a pipeline without a transformer; only transformers are compressed"
    raise InputError(message)
