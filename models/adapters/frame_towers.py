"""Image towers that see a clip frame by frame: CLIP, SigLIP and DINOv2.

Sources: CLIP (Radford et al., 2021, arXiv:2103.00020), SigLIP (Zhai et al., 2023,
arXiv:2303.15343), DINOv2 (Oquab et al., 2023, arXiv:2304.07193) without and with registers (Darcet
et al., 2023, arXiv:2309.16588), as the library transformers builds them. What a tower says of a
picture, it says here of every frame: CLIP's projected class token (the normalised one where there
is no projection), SigLIP's attention-pooled token, DINOv2's normalised class token.

How many frames a clip has stands in no such configuration: 8, or `num_frames` if it is added.

Shapes: B clips, T frames, C channels, H x W pixels, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.configuration import build_with, clip_of, edges_of
from vcompress.models.adapters.tower_names import as_the_library_names
from vcompress.models.checkpoint import load_state
from vcompress.models.video import Pooling, TokenGrid
from vcompress.spec.errors import InputError

__all__ = ["CLIP", "DINOV2", "DINOV2_WITH_REGISTERS", "SIGLIP", "FrameTower"]

DEFAULT_NUM_FRAMES = 8
_PROJECTION = "visual_projection.weight"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FrameTower(nn.Module):
    """Clips `[B, T, C, H, W]` to one embedding a frame, `[B, T, D]`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Every frame for itself through the tower."""
        output = self.tower(clips.flatten(0, 1))
        embedding = getattr(output, "image_embeds", None)
        if embedding is None:
            embedding = output.pooler_output
        frames: torch.Tensor = embedding.reshape(-1, clips.shape[1], embedding.shape[-1])
        return frames

    def set_attn_implementation(self, name: str) -> None:
        """Let the tower compute its attention with the function that transformers knows as `name`.

        Where the tower is exchanged, this must be too: token reduction calls it.
        """
        self.tower.set_attn_implementation(name)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What the towers of one family have in common.

    Attributes:
        config_class, model_classes: in transformers; the first model is what a plain checkpoint
            holds.
        patch_size, image_size: where the configuration does not say.
        mean, std: that pictures were normalised with in training.
        special: tokens in front of the patches, registers not counted.
        pooling: how the patches become the embedding.
        resize: how a frame becomes the model's size, see `ClipSpec`.
        any_size: whether position embeddings are interpolated to the size of the frames.
    """

    family: str
    config_class: str
    model_classes: tuple[str, ...]
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 224
    special: int = 1
    pooling: Pooling = "class_token"
    resize: Literal["cover", "exact"] = "cover"
    any_size: bool = False


def _check_head(kind: _Kind, config: Mapping[str, Any]) -> None:
    if not config.get("vision_use_head", True):
        message = (
            f"vision_use_head of a {kind.family} must be true, got false: without its pooling "
            "head the tower has no embedding of a frame; give a checkpoint with the head"
        )
        raise InputError(message)


def _build(kind: _Kind, config: Mapping[str, Any]) -> FrameTower:
    _check_head(kind, config)
    named = [str(name) for name in config.get("architectures") or ()]
    chosen = next((name for name in named if name in kind.model_classes), kind.model_classes[0])
    known = {key: value for key, value in config.items() if key != "num_frames"}
    return FrameTower(build_with(kind.config_class, chosen, known)).eval()


def _load(
    kind: _Kind, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], where: str
) -> nn.Module:
    """A tower with the weights of a checkpoint, whose names are transformers' or `FrameTower`'s."""
    state = {name.removeprefix("tower."): tensor for name, tensor in state_dict.items()}
    if kind is _CLIP:
        # The configuration of a tower with a projection does not differ from that of one without.
        projected = _PROJECTION in state
        config = {**config, "architectures": [kind.model_classes[int(projected)]]}
    built = _build(kind, config)
    load_state(built.tower, as_the_library_names(state, built.tower.state_dict()), where)
    return built


def _adopt(
    kind: _Kind, module: nn.Module, config: Mapping[str, Any], processor: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    found = type(module).__name__
    if found not in kind.model_classes:
        message = (
            f"a {kind.family} directory must hold a {' or a '.join(kind.model_classes)}, got a "
            f"{found}; save the tower inside it with save_pretrained"
        )
        raise InputError(message)
    _check_head(kind, config)
    if kind.any_size:
        edge = _square_edge(processor)
        if edge is not None and edge != config.get("image_size", kind.image_size):
            _fit_positions(module, edge)
            config = {**config, "image_size": edge}
    return FrameTower(module), config


def _square_edge(processor: Mapping[str, Any]) -> int | None:
    """Edge of the square frames that the processor of a directory makes, if it says so."""
    crops = processor.get("do_center_crop", True) and "crop_size" in processor
    size = processor["crop_size"] if crops else processor.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") if size.get("height") == size.get("width") else None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _fit_positions(tower: nn.Module, edge: int) -> None:
    """Interpolate position embeddings once, as the tower would do at every frame of `edge` pixels.

    Inside the graph this would be a bicubic resize of a constant, which not all runtimes have.
    """
    embeddings: Any = tower.embeddings
    height, width = embeddings.patch_embeddings.patch_size
    num_tokens = (edge // height) * (edge // width) + 1
    tokens = embeddings.position_embeddings.new_empty(1, num_tokens, 1)
    with torch.no_grad():
        tokens = tokens.expand(-1, -1, embeddings.position_embeddings.shape[-1])
        fitted = embeddings.interpolate_pos_encoding(tokens, edge, edge)
    embeddings.position_embeddings = nn.Parameter(fitted.clone())


def _describe(kind: _Kind, config: Mapping[str, Any]) -> Description:
    num_frames = config.get("num_frames", DEFAULT_NUM_FRAMES)
    image_size = config.get("image_size", kind.image_size)
    clip = replace(clip_of(config, num_frames, image_size), resize=kind.resize)
    if clip.channels == len(kind.mean):
        clip = replace(clip, mean=kind.mean, std=kind.std)
    patch_height, patch_width = edges_of(config.get("patch_size", kind.patch_size))
    registers = int(config.get("num_register_tokens", 4)) if "register" in kind.family else 0
    grid = TokenGrid(
        frames=clip.num_frames,
        height=clip.height // patch_height,
        width=clip.width // patch_width,
        special=kind.special + registers,
        arrangement="frames",
    )
    return Description(task="embed", clip=clip, token_grid=grid, labels=(), pooling=kind.pooling)


def _adapter(kind: _Kind) -> Adapter:
    return Adapter(
        family=kind.family,
        build=partial(_build, kind),
        describe=partial(_describe, kind),
        load=partial(_load, kind),
        adopt=partial(_adopt, kind),
    )


_CLIP = _Kind(
    family="clip_vision_model", config_class="CLIPVisionConfig",
    model_classes=("CLIPVisionModel", "CLIPVisionModelWithProjection"), patch_size=32,
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip
CLIP = _adapter(_CLIP)
SIGLIP = _adapter(_Kind(
    family="siglip_vision_model", config_class="SiglipVisionConfig",
    model_classes=("SiglipVisionModel",), patch_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    special=0, pooling="attention", resize="exact",
))  # fmt: skip
DINOV2 = _adapter(_Kind(
    family="dinov2", config_class="Dinov2Config", model_classes=("Dinov2Model",), patch_size=14,
    mean=_IMAGENET[0], std=_IMAGENET[1], any_size=True,
))  # fmt: skip
DINOV2_WITH_REGISTERS = _adapter(_Kind(
    family="dinov2_with_registers", config_class="Dinov2WithRegistersConfig",
    model_classes=("Dinov2WithRegistersModel",), patch_size=16,
    mean=_IMAGENET[0], std=_IMAGENET[1], any_size=True,
))  # fmt: skip
