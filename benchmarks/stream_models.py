"""What `benchmarks/stream.py` runs: factorised encoders of three forms, and streams of a pen.

The encoders have random weights: neither time nor equality depends on what a model knows. The pen
streams are for the trained reference model: strokes of penvideo20, each followed by a pause, with
the noise of a sensor.

Shapes: B clips, T frames, C channels, H x W pixels, L places, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vcompress.models.load import ADAPTERS, LoadOptions, wrap_module
from vcompress.models.reference.catalog import reference_clips
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec

__all__ = ["FactorisedVivit", "factorised_vivit", "pen_stream", "tower_with_head", "videoprism"]

NUM_FRAMES = 16
_NUM_CLASSES = 20


class FactorisedVivit(nn.Module):
    """ViViT's model 2 (Arnab et al., 2021, arXiv:2103.15691): a spatial encoder of tubelets, whose
    class tokens a temporal encoder sees.

    Args:
        tubelet: frames of a tubelet.
    """  # noqa: D205

    def __init__(
        self, *, width: int, heads: int, size: int, patch: int, tubelet: int, spatial: int,
        temporal: int,
    ) -> None:  # fmt: skip
        super().__init__()
        places = (size // patch) ** 2
        edges = (tubelet, patch, patch)
        self.embed = nn.Conv3d(3, width, kernel_size=edges, stride=edges)
        self.places = nn.Parameter(0.02 * torch.randn(1, places + 1, width))
        self.moments = nn.Parameter(0.02 * torch.randn(1, NUM_FRAMES // tubelet + 1, width))
        self.classes = nn.Parameter(0.02 * torch.randn(2, 1, 1, width))
        self.spatial = _encoder(width, heads, spatial)
        self.temporal = _encoder(width, heads, temporal)
        self.head = nn.Linear(width, _NUM_CLASSES)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[B, T, C, H, W]` to logits `[B, K]`."""
        tubes = self.embed(clips.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        num_clips, num_tubes = tubes.shape[:2]
        tokens = tubes.flatten(0, 1)
        first = self.classes[0].expand(len(tokens), -1, -1)
        tokens = self.spatial(torch.cat((first, tokens), dim=1) + self.places)
        frames = tokens[:, 0].unflatten(0, (num_clips, num_tubes))
        first = self.classes[1].expand(num_clips, -1, -1)
        frames = self.temporal(torch.cat((first, frames), dim=1) + self.moments)
        logits: torch.Tensor = self.head(frames[:, 0])
        return logits


def _encoder(width: int, heads: int, depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)


class _TowerWithHead(nn.Module):
    """An image tower over every frame, and a temporal encoder over what it says of each."""

    def __init__(self, tower: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        self.tower = tower
        self.moments = nn.Parameter(0.02 * torch.randn(1, NUM_FRAMES, width))
        self.temporal = _encoder(width, heads, 4)
        self.head = nn.Linear(width, _NUM_CLASSES)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[B, T, C, H, W]` to logits `[B, K]`."""
        logits: torch.Tensor = self.head(
            self.temporal(self.tower(clips) + self.moments).mean(dim=1)
        )
        return logits


def factorised_vivit(
    *, width: int = 192, size: int = 224, tubelet: int = 1, spatial: int = 12, temporal: int = 4
) -> VideoModel:
    """`spatial` layers over the places of a frame or tubelet, `temporal` over class tokens."""
    torch.manual_seed(0)
    module = FactorisedVivit(
        width=width, heads=width // 64, size=size, patch=16, tubelet=tubelet, spatial=spatial,
        temporal=temporal,
    )  # fmt: skip
    return _wrapped(module, f"vivit-factorised-{tubelet}", size)


def tower_with_head(*, width: int = 192, size: int = 168) -> VideoModel:
    """A DINOv2 tower of 12 layers and a temporal encoder of 4."""
    torch.manual_seed(0)
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.family == "dinov2"]
    tower = adapter.build({
        "hidden_size": width, "num_attention_heads": width // 64, "num_hidden_layers": 12,
        "image_size": size, "patch_size": 14, "num_frames": NUM_FRAMES,
    })  # fmt: skip
    return _wrapped(_TowerWithHead(tower, width, width // 64), "dinov2-temporal-head", size)


def videoprism(*, width: int = 192, size: int = 168) -> VideoModel:
    """VideoPrism-B's proportions: 12 spatial and 4 temporal layers, both over all places."""
    torch.manual_seed(0)
    (adapter,) = [adapter for adapter in ADAPTERS if adapter.family == "videoprism_vision_model"]
    config: dict[str, Any] = {
        "image_size": size, "num_frames": NUM_FRAMES, "hidden_size": width,
        "num_attention_heads": width // 64, "intermediate_size": 4 * width,
        "tubelet_size": [1, 14, 14], "num_spatial_layers": 12, "num_temporal_layers": 4,
    }  # fmt: skip
    return _wrapped(adapter.build(config), "videoprism", size)


def _wrapped(module: nn.Module, name: str, size: int) -> VideoModel:
    clip = ClipSpec(num_frames=NUM_FRAMES, height=size, width=size)
    return wrap_module(module, name=name, options=LoadOptions(), task="classify", clip=clip)


def pen_stream(path: Path, *, part: str, seed: int, num_strokes: int = 6) -> None:
    """Write a video of strokes of penvideo20 with pauses of up to 3 seconds between them.

    Args:
        part: "calibration" or "test", whose strokes have other writers.
    """
    import av

    generator = np.random.default_rng(seed)
    strokes, _, _ = reference_clips(
        "penvideo20", "test" if part == "test" else "calibration", limit=num_strokes, seed=seed
    )
    frames = [
        frame
        for stroke in strokes
        for frame in (*stroke, *[stroke[-1]] * int(generator.integers(0, 75)))
    ]
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "gray"
        for frame in frames:
            noisy = frame[..., 0] + generator.normal(0, 4, frame.shape[:2])
            picture = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "gray")))
        output.mux(stream.encode())
