"""The attention that reduced tokens need: it leaves its query and key, and weighs by size.

Proportional attention (Bolya et al., 2022, arXiv:2210.09461, equation 1) adds the logarithm of a
token's size to its scores, as if the token stood there that many times. As a mask this forbids the
fastest fused kernels, so there is a second form with the same result: one more channel that holds
1 / scale in the query and log(size) in the key.

Shapes: B sequences, H heads, M tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.pixels import PixelFeature
from vcompress.compress.tokens.view import AttentionInputs

__all__ = ["STATE", "TokenState", "attend", "install_attention"]

STATE = "vcompress_token_state"
_IS_READER = "vcompress_token_reader"
_ATTENTION_NAME = "vcompress_tokens"
# Fused kernels want head widths that are multiples of this.
_WIDTH_MULTIPLE = 8


@dataclass
class TokenState:
    """What flows beside the tokens during one forward pass; the first block starts it anew.

    Attributes:
        layout: of the tokens.
        attention: a name in `spec.token_section.ATTENTIONS`.
        sizes: `[B', N]`; None while every token is one patch.
        inputs: of the attention that ran last.
        first_positions: `[1, N, 3]` (frame, row, column) of all patches, where the model computes
            with positions; else None.
        positions: `[B', N, 3]`, the same of what is left; None before the first reduction.
        pixels: `[B', N]` by feature, of the clip that entered the model, where a technique reads
            it; see `View`.
        trace: whether to keep `origin`.
        origin: `[B', N at the start]`, where each patch is now, or -1; None before the first
            reduction.
    """

    layout: Layout
    attention: str
    sizes: torch.Tensor | None = None
    inputs: AttentionInputs | None = None
    first_positions: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    pixels: dict[PixelFeature, torch.Tensor] = field(default_factory=dict)
    trace: bool = False
    origin: torch.Tensor | None = None

    def reset(self) -> None:
        """Forget the clip before."""
        self.sizes = self.inputs = self.positions = self.origin = None

    def positions_of(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Positions `[B', N, 3]` of `tokens` `[B', N, C]`; None where no model asks for them."""
        if self.positions is not None or self.first_positions is None:
            return self.positions
        return self.first_positions.to(tokens.device).expand(tokens.shape[0], -1, -1)

    def log_sizes(self, num_keys: int, *, is_reader: bool = False) -> torch.Tensor | None:
        """What is added to the scores of `num_keys` keys, float32 `[B, M]`; None where nothing.

        A reader at the end weighs by size whatever the blocks do, as an average does.
        """
        if self.sizes is None or (self.attention == "plain" and not is_reader):
            return None
        return self.layout.spread_sizes(self.sizes, num_keys).log()


def install_attention(
    module: nn.Module, blocks: list[nn.Module], readers: list[nn.Module], state: TokenState
) -> None:
    """Let attentions inside `blocks` and `readers` of a transformers model work with `state`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, _attention)
    module.set_attn_implementation(_ATTENTION_NAME)  # type: ignore[operator]
    for part in (*blocks, *readers):
        for submodule in part.modules():
            setattr(submodule, STATE, state)
            setattr(submodule, _IS_READER, part in readers)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None = None, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention over `[B, H, M, D]` as transformers calls it."""
    output = attend(
        getattr(module, STATE, None), query, key, value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=attention_mask, dropout=dropout, softcap=softcap,
        is_reader=getattr(module, _IS_READER, False),
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def attend(
    state: TokenState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    scale: float, mask: torch.Tensor | None = None, dropout: float = 0.0,
    softcap: float | None = None, is_reader: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention over `[B, H, M, D]`, which leaves its inputs in `state` and weighs by its sizes.

    Args:
        state: None for an attention that has nothing to do with reduced tokens.
        mask: added to the scores.
        softcap: scores are squeezed into +-softcap before anything is added.
        is_reader: see `TokenState.log_sizes`.
    """
    logs = None if state is None else state.log_sizes(key.shape[2], is_reader=is_reader)
    bias = None if logs is None else logs[:, None, None, :].to(query.dtype)
    if state is not None:
        state.inputs = AttentionInputs(query=query, key=key, scale=scale, bias=bias)
    if softcap is not None:
        return _capped(query, key, value, mask, bias, scale, softcap)
    if bias is not None and mask is None and _is_fused(state):
        return proportional_fused(query, key, value, logs, scale)
    if bias is not None:
        mask = bias if mask is None else mask + bias
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )


def _is_fused(state: TokenState | None) -> bool:
    return state is not None and state.attention == "proportional_fused"


def proportional_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logs: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention with `logs` `[B, M]` added to the scores of each key, without a mask."""
    assert logs is not None
    width = query.shape[-1]
    padding = -(width + 1) % _WIDTH_MULTIPLE
    one = torch.full_like(query[..., :1], 1 / scale)
    column = logs[:, None, :, None].to(key.dtype).expand(-1, key.shape[1], -1, 1)
    wide_query = functional.pad(torch.cat([query, one], dim=-1), (0, padding))
    wide_key = functional.pad(torch.cat([key, column], dim=-1), (0, padding))
    wide_value = functional.pad(value, (0, padding + 1))
    output = functional.scaled_dot_product_attention(wide_query, wide_key, wide_value, scale=scale)
    return output[..., :width]


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, scale: float, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Scores squeezed into +-softcap before anything is added; no fused kernel does this."""
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)) * (scale / softcap))
    for addend in (mask, bias):
        scores = scores if addend is None else scores + addend
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
