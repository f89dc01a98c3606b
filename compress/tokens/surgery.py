"""Put token merging into a transformers model without touching its code.

A forward hook on each block merges the block's output; one attention function, registered with
transformers' public `AttentionInterface`, hands over the keys that matching needs and, where the
plan says so, adds the logarithm of the token sizes to the scores (proportional attention, Bolya et
al., 2022, equation 1). A model that averages its tokens at the end gets the size-weighted average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.tokens.merging import match, max_merges, merge
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.plan import TokenSection

__all__ = ["TECHNIQUE", "apply_merging", "objection"]

TECHNIQUE = "bipartite_soft_matching"

_ATTENTION_NAME = "vcompress_merging"
_STATE = "vcompress_merge_state"


@dataclass
class _MergeState:
    """What flows beside the tokens during one forward pass; the first block starts it anew."""

    proportional: bool
    keys: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


def objection(model: VideoModel) -> str | None:
    """Why tokens of `model` cannot be merged, or None."""
    if model.token_grid is None:
        return f"the token grid of family {model.family!r} is not known"
    if model.pooling is None:
        return f"how family {model.family!r} pools its tokens is not known"
    if not hasattr(model.module, "set_attn_implementation"):
        return f"the attention of family {model.family!r} cannot be exchanged"
    return None


def apply_merging(model: VideoModel, section: TokenSection) -> None:
    """Install `section` in `model.module`. A section without merges changes nothing at all."""
    active = {block: count for block, count in section.merge.items() if count > 0}
    if not active:
        return
    reason = objection(model)
    if reason is not None:
        message = f"tokens cannot be merged: {reason}; remove the section tokens"
        raise InputError(message)
    assert model.token_grid is not None
    if section.technique != TECHNIQUE:
        message = f"tokens.technique must be {TECHNIQUE}, got {section.technique!r}"
        raise InputError(message)
    if section.num_tokens != model.token_grid.num_tokens:
        message = (
            f"tokens.num_tokens must be {model.token_grid.num_tokens}, as the model has, got "
            f"{section.num_tokens}"
        )
        raise InputError(message)
    _check_counts(model.blocks, section, model.token_grid.special)
    _register_attention()
    model.module.set_attn_implementation(_ATTENTION_NAME)  # type: ignore[operator]
    state = _MergeState(proportional=section.proportional)
    for name in model.blocks:
        block = model.layer(name)
        for submodule in block.modules():
            setattr(submodule, _STATE, state)
        if name in active:
            block.register_forward_hook(_Merge(state, active[name], model.token_grid.special))
    model.layer(model.blocks[0]).register_forward_pre_hook(_Start(state))
    if model.pooling == "mean":
        model.layer(model.blocks[-1]).register_forward_hook(_Weigh(state))


def _check_counts(blocks: tuple[str, ...], section: TokenSection, num_special: int) -> None:
    num_tokens = section.num_tokens
    for name in blocks:
        merges = section.merge.get(name, 0)
        if merges > max_merges(num_tokens, num_special):
            message = (
                f"tokens.merge.{name}: {merges} of {num_tokens} tokens cannot be merged at once; "
                f"the most is {max_merges(num_tokens, num_special)}"
            )
            raise InputError(message)
        num_tokens -= merges


# The hooks are objects, not closures: a deep copy of the model then copies them together with the
# state that they share, where closures would go on writing into the state of the original.
@dataclass
class _Start:
    state: _MergeState

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self.state.keys = self.state.sizes = None


@dataclass
class _Merge:
    state: _MergeState
    merges: int
    num_special: int

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        state = self.state
        sizes = torch.ones_like(tokens[..., 0]) if state.sizes is None else state.sizes
        assert state.keys is not None, "the attention function did not run"
        matching = match(state.keys, self.merges, self.num_special)
        tokens, state.sizes = merge(tokens, sizes, matching)
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


@dataclass
class _Weigh:
    state: _MergeState

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        sizes = self.state.sizes
        assert sizes is not None
        # The model divides by the number of tokens; afterwards it has divided by the patches.
        share = sizes * (tokens.shape[1] / sizes.sum(dim=1, keepdim=True))
        tokens = tokens * share.to(tokens.dtype)[..., None]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None = None, scaling: float | None = None,
    dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention over `[B, heads, N, D]` that leaves its keys for the matching."""
    state: _MergeState | None = getattr(module, _STATE, None)
    if state is not None:
        state.keys = key.mean(dim=1)
        if state.proportional and state.sizes is not None:
            bias = state.sizes.log()[:, None, None, :].to(query.dtype)
            attention_mask = bias if attention_mask is None else attention_mask + bias
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, _attention)
