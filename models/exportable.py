"""Parts of diffusers that do not export as they are, with the same numbers for the result.

The sine of a time step needs frequencies that every runtime computes alike: times go up to 1000,
guidance to 6000, and one unit in the last place of a frequency then moves the sine by more than
rounding does, which a quantizer behind it turns into a step. So they are made once, here.

Mochi's attention picks the tokens of text that are not padding with `nonzero`, sample by sample. A
graph of fixed shapes cannot do that; a mask on the keys can. The outputs of padded tokens differ,
and nothing reads them: they are masked as keys in every block, and the result is that of the
latents alone. (With padding in front of the text, which no pipeline makes, the original attention
puts tokens in each other's places; the mask does not.)

Shapes: B samples, D channels, N tokens of latents, L tokens of text, K heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

__all__ = ["exportable"]

_MAX_PERIOD = 10000


def exportable(module: nn.Module) -> nn.Module:
    """`module` with its parts of the kinds above exchanged, in place."""
    for name, submodule in list(module.named_modules()):
        if type(submodule).__name__ == "Timesteps" and hasattr(submodule, "downscale_freq_shift"):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, TimeEmbedding(submodule))
        processor = getattr(submodule, "processor", None)
        if type(processor).__name__ == "MochiAttnProcessor2_0":
            # No module, so nothing of nn.Module is in its way.
            submodule.__dict__["processor"] = MaskedMochiAttention()
    return module


class TimeEmbedding(nn.Module):
    """Sines and cosines of times `[B]`, `[B, D]`, as `Timesteps` of diffusers computes them."""

    frequencies: torch.Tensor

    def __init__(self, original: Any) -> None:
        """Take the sizes from `original`."""
        super().__init__()
        self.num_channels = int(original.num_channels)
        self.flip_sin_to_cos = bool(original.flip_sin_to_cos)
        self.scale = getattr(original, "scale", 1)
        half = self.num_channels // 2
        exponents = -math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(exponents / (half - original.downscale_freq_shift))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Sines first, or cosines if they are flipped."""
        angles = self.scale * (timesteps[:, None].float() * self.frequencies)
        pair = [angles.sin(), angles.cos()]
        embedded = torch.cat(pair[::-1] if self.flip_sin_to_cos else pair, dim=-1)
        return functional.pad(embedded, (0, self.num_channels % 2))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device; frequencies are always float32."""
        self.frequencies = self.frequencies.to(fn(self.frequencies).device)
        return self


class MaskedMochiAttention:
    """Mochi's joint attention of latents and text, with padding masked."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor, image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Latents `[B, N, C]` and text `[B, L, C']`, of which `attention_mask` `[B, L]` counts."""
        num_latents = hidden_states.shape[1]

        def heads(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            split: torch.Tensor = layer(x).unflatten(2, (attn.heads, -1))
            return split

        query, key = heads(attn.to_q, hidden_states), heads(attn.to_k, hidden_states)
        text_query = heads(attn.add_q_proj, encoder_hidden_states)
        text_key = heads(attn.add_k_proj, encoder_hidden_states)
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        text_query = _normed(attn.norm_added_q, text_query)
        text_key = _normed(attn.norm_added_k, text_key)
        if image_rotary_emb is not None:
            query, key = _rotated(query, *image_rotary_emb), _rotated(key, *image_rotary_emb)
        value = heads(attn.to_v, hidden_states)
        text_value = heads(attn.add_v_proj, encoder_hidden_states)
        allowed = functional.pad(attention_mask.bool(), (num_latents, 0), value=True)
        query, key, value = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in ((query, text_query), (key, text_key), (value, text_value))
        )
        joined = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed[:, None, None]
        )
        joined = joined.transpose(1, 2).flatten(2, 3)
        latents = attn.to_out[1](attn.to_out[0](joined[:, :num_latents]))
        text = joined[:, num_latents:]
        return latents, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _normed(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    result: torch.Tensor = norm(x)
    return result


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels turned as pairs."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    pairs = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return pairs.flatten(-2).to(x.dtype)
