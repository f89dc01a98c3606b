"""Models of the sizes of real ones, with random weights: for time and memory, never for quality.

Wan-1.3B and CogVideoX-2B at 480p in the classes of diffusers, and a VideoMAE of ViT-L size over
clips of 16 frames at 224 x 224 in that of transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import torch
from torch import nn

from vcompress.compress.tokens.windows import Box
from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import VideoModel

__all__ = [
    "SUBJECTS",
    "Subject",
    "absent",
    "build_denoiser",
    "build_recogniser",
    "tiny",
    "to_bfloat16",
]

_TOOL = {"wan": "diffusers", "cogvideox": "diffusers", "videomae": "transformers"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Sizes of a model.

    Attributes:
        grid: frames, height and width in tokens.
        patch: frames, height and width of a token in latents or pixels.
        context: tokens of text; 0 for a recogniser.
        context_width: channels of a token of text.
        steps: of a generation that is timed; 1 for a recogniser.
        linears: in and out channels of a block's linear layers that see all tokens, with how often.
    """

    name: str
    family: str
    width: int
    depth: int
    heads: int
    hidden: int
    grid: Box
    patch: Box
    context: int
    context_width: int
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        return prod(self.grid)

    @property
    def linears(self) -> dict[tuple[int, int], int]:
        """How many linear layers of a block see all tokens, by input and output channels."""
        # Wan's attention to the text has its query and output over all tokens.
        square = 6 if self.family == "wan" else 4
        return {
            (self.width, self.width): square, (self.width, self.hidden): 1,
            (self.hidden, self.width): 1,
        }  # fmt: skip


SUBJECTS: Mapping[str, Subject] = {
    each.name: each
    for each in (
        # 81 frames of 480 x 832.
        Subject(name="wan-1.3b", family="wan", width=1536, depth=30, heads=12, hidden=8960,
                grid=(21, 30, 52), patch=(1, 2, 2), context=512, context_width=4096, batch=1,
                steps=20),
        # 49 frames of 480 x 720.
        Subject(name="cogvideox-2b", family="cogvideox", width=1920, depth=30, heads=30,
                hidden=7680, grid=(13, 30, 45), patch=(1, 2, 2), context=226, context_width=4096,
                batch=1, steps=20),
        Subject(name="vit-l", family="videomae", width=1024, depth=24, heads=16, hidden=4096,
                grid=(8, 14, 14), patch=(2, 16, 16), context=0, context_width=0, batch=8, steps=1),
    )
}  # fmt: skip


def tiny(subject: Subject) -> Subject:
    """The same form in sizes that a CPU runs at once."""
    recogniser = subject.steps == 1
    return replace(
        subject, width=64, depth=3, heads=2, hidden=128, grid=(2, 4, 4), batch=1,
        patch=(2, 4, 4) if recogniser else subject.patch,
        context=0 if recogniser else 16, context_width=0 if recogniser else 32,
        steps=1 if recogniser else 10,
    )  # fmt: skip


def absent(subject: Subject) -> str | None:
    """The package that `subject` needs and that is not installed."""
    package = _TOOL[subject.family]
    return None if importlib.util.find_spec(package) else package


def to_bfloat16(module: nn.Module) -> nn.Module:
    """`module` of diffusers in the types that its `from_pretrained` gives it, in place."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or []
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        if each.is_floating_point() and not any(part in name for part in kept):
            each.data = each.data.to(torch.bfloat16)
    return module


def build_denoiser(
    subject: Subject, device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The transformer in bfloat16, and what one step gives it."""
    import diffusers

    torch.manual_seed(0)
    kind: Any
    head = subject.width // subject.heads
    frames, height, width = (
        edge * side for edge, side in zip(subject.grid, subject.patch, strict=True)
    )
    if subject.family == "wan":
        kind, latent = diffusers.WanTransformer3DModel, (16, frames, height, width)
        config: dict[str, Any] = {
            "num_attention_heads": subject.heads, "attention_head_dim": head,
            "text_dim": subject.context_width, "ffn_dim": subject.hidden,
            "num_layers": subject.depth, "patch_size": subject.patch,
        }  # fmt: skip
    else:
        kind, latent = diffusers.CogVideoXTransformer3DModel, (frames, 16, height, width)
        config = {
            "num_attention_heads": subject.heads, "attention_head_dim": head,
            "text_embed_dim": subject.context_width, "num_layers": subject.depth,
            "patch_size": subject.patch[1], "sample_height": height, "sample_width": width,
            # Frames of a video: four to one of the latent.
            "sample_frames": 4 * (frames - 1) + 1, "max_text_seq_length": subject.context,
        }  # fmt: skip
    with device:
        module = to_bfloat16(kind(**config)).eval().requires_grad_(False)
    call = {
        "hidden_states": torch.randn(subject.batch, *latent),
        "encoder_hidden_states": torch.randn(
            subject.batch, subject.context, subject.context_width
        ),
    }  # fmt: skip
    return module, {name: each.to(device, torch.bfloat16) for name, each in call.items()}


def build_recogniser(subject: Subject) -> VideoModel:
    """The recogniser with random weights, in float32 on the CPU, and of 400 classes."""
    config: dict[str, Any] = {
        "image_size": subject.grid[1] * subject.patch[1], "patch_size": subject.patch[1],
        "num_frames": subject.grid[0] * subject.patch[0], "tubelet_size": subject.patch[0],
        "hidden_size": subject.width, "num_hidden_layers": subject.depth,
        "num_attention_heads": subject.heads, "intermediate_size": subject.hidden,
        "num_labels": 400,
    }  # fmt: skip
    torch.manual_seed(0)
    adapter = next(each for each in load.ADAPTERS if each.family == "videomae")
    checkpoint = load.checkpoints.Checkpoint(
        family="videomae", config=config,
        state_dict=cast("dict[str, torch.Tensor]", adapter.build(config).state_dict()),
    )  # fmt: skip
    return load.from_checkpoint(
        checkpoint, name=subject.name, source=subject.name, options=LoadOptions()
    )
