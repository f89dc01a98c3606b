"""TimeSformer: its attention is written into its blocks, and so is the grid of its places.

What: blocks that do what a `TimesformerLayer` of transformers does, for any number of places, with
an attention that weighs by size. They take over the layer's children under the same names and call
them as modules, so that every linear can still be replaced.
Source: Bertasius et al., 2021, arXiv:2102.05095: divided space-time attention (each place attends
over the frames, then each frame over its places) and joint attention.
What we changed: dropout of attention probabilities is left out; these are models that were trained.

Shapes: B clips, T frames, L places that are left, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.compress.tokens.attention import TokenState, attend
from vcompress.compress.tokens.families.base import Family
from vcompress.models.video import VideoModel

__all__ = ["TIMESFORMER", "DividedBlock", "JointBlock"]


class _WrittenBlock(nn.Module):
    """Holds the children of a layer under their names."""

    attention: Any
    layernorm_before: Any
    layernorm_after: Any
    intermediate: Any
    output: Any
    drop_path: Any

    def __init__(self, layer: nn.Module, state: TokenState) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.train(layer.training)
        self.state = state

    def with_mlp(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The second half of a block; fused attention has no probabilities to return."""
        update = self.output(self.intermediate(self.layernorm_after(hidden)))
        return hidden + self.drop_path(update), None


class DividedBlock(_WrittenBlock):
    """Attention over time at each place, then over the places of each frame.

    The places are the same in every frame, so the frames at one place say as much as ever: sizes
    count in the attention over places alone.
    """

    temporal_layernorm: Any
    temporal_attention: Any
    temporal_dense: Any

    def forward(
        self, hidden_states: torch.Tensor, _output_attentions: bool = False
    ) -> tuple[torch.Tensor, None]:
        """Class token and patches `[B, 1 + L * T, C]`, places first."""
        num_frames, width = self.state.layout.grid.frames, hidden_states.shape[-1]
        class_token, patches = hidden_states[:, :1], hidden_states[:, 1:]
        places = patches.shape[1] // num_frames

        tubes = self.temporal_layernorm(patches.reshape(-1, num_frames, width))
        update = self.drop_path(_attention(self.temporal_attention, tubes, None))
        patches = patches + self.temporal_dense(update.reshape(-1, places * num_frames, width))

        frames = patches.reshape(-1, places, num_frames, width).transpose(1, 2)
        frames = frames.reshape(-1, places, width)
        class_tokens = class_token.repeat(1, num_frames, 1).reshape(-1, 1, width)
        frames = self.layernorm_before(torch.cat([class_tokens, frames], dim=1))
        update = self.drop_path(_attention(self.attention, frames, self.state))
        # Every frame has its own opinion of the class token.
        class_update = update[:, 0].reshape(-1, num_frames, width).mean(dim=1, keepdim=True)
        update = update[:, 1:].reshape(-1, num_frames, places, width).transpose(1, 2)
        update = update.reshape(-1, places * num_frames, width)
        return self.with_mlp(
            torch.cat([class_token, patches], dim=1) + torch.cat([class_update, update], dim=1)
        )


class JointBlock(_WrittenBlock):
    """Attention over all tokens of a clip."""

    def forward(
        self, hidden_states: torch.Tensor, _output_attentions: bool = False
    ) -> tuple[torch.Tensor, None]:
        """Class token and patches `[B, 1 + N, C]`."""
        update = _attention(self.attention, self.layernorm_before(hidden_states), self.state)
        return self.with_mlp(hidden_states + self.drop_path(update))


@dataclass
class _FramesFirst:
    """Puts tokens that stand places first into raster order; joint blocks do not care."""

    num_frames: int

    def __call__(self, _block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        patches, width = hidden[:, 1:], hidden.shape[-1]
        places = patches.shape[1] // self.num_frames
        raster = patches.reshape(-1, places, self.num_frames, width).transpose(1, 2)
        raster = raster.reshape(-1, places * self.num_frames, width)
        return (torch.cat([hidden[:, :1], raster], dim=1), *inputs[1:])


def _prepare(model: VideoModel, state: TokenState) -> None:
    """Replace the blocks of `model` by written ones that work with `state`."""
    grid = state.layout.grid
    kind = DividedBlock if grid.arrangement == "divided" else JointBlock
    for name in model.token_blocks:
        model.module.set_submodule(name, kind(model.layer(name), state))
    if kind is JointBlock:
        first = model.layer(model.token_blocks[0])
        first.register_forward_pre_hook(_FramesFirst(grid.frames))


def _attention(attention: Any, hidden: torch.Tensor, state: TokenState | None) -> torch.Tensor:
    """`TimeSformerAttention` over `[B', M, C]`; with `state` it weighs by size."""
    inner = attention.attention
    _, num_tokens, width = hidden.shape
    shape = (-1, num_tokens, 3, inner.num_heads, width // inner.num_heads)
    query, key, value = inner.qkv(hidden).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    output = attend(state, query, key, value, scale=inner.scale)
    found: torch.Tensor = attention.output(output.transpose(1, 2).reshape(-1, num_tokens, width))
    return found


TIMESFORMER = Family(prepare=_prepare, uses_attention_interface=False)
