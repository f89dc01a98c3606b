"""Torch's own multi-head attention, with its products as linear layers.

`nn.MultiheadAttention` keeps the projections of query, key and value in one parameter and hands all
weights to a function, so none of its products is a layer that runs: nothing could be calibrated,
planned or quantized there, in a module that most hand-written transformers are made of. Here each
projection is an `nn.Linear` of its own, and attention is `scaled_dot_product_attention`: the same
sums, whose roundings may differ in the last bits.

Legend: B samples, L queries, S keys, E channels, H heads, D = E / H channels a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vcompress.models.calls import Batch
from vcompress.models.structure import computes_alike

__all__ = ["LinearAttention", "with_linear_attention"]


def with_linear_attention(module: nn.Module, example: Batch) -> nn.Module:
    """`module`, or a copy of it in which every attention that can be is a `LinearAttention`.

    The copy is run on `example`; where it does not run, or departs (a model that reads the packed
    weights itself), `module` is returned as it is, and its attention is then reported as kept.
    """
    # One attention that is used in two places stays one.
    everywhere = module.named_modules(remove_duplicate=False)
    found = [name for name, part in everywhere if _can_be_split(part) and name]
    if not found:
        return module
    changed = copy.deepcopy(module)
    made: dict[nn.Module, LinearAttention] = {}
    for name in found:
        attention = changed.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        made.setdefault(attention, LinearAttention(attention))
        parent, _, child = name.rpartition(".")
        setattr(changed.get_submodule(parent), child, made[attention])
    return changed if computes_alike(module, changed, example) else module


def _can_be_split(part: nn.Module) -> bool:
    # A subclass may compute something else.
    return type(part) is nn.MultiheadAttention and part.bias_k is None and not part.add_zero_attn


class LinearAttention(nn.Module):
    """What `original` computes in evaluation mode, with the same arguments and results."""

    # `nn.TransformerEncoderLayer` asks for these before it hands all weights to one fused kernel,
    # which must not happen.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        """Take the weights of `original`."""
        super().__init__()
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.batch_first = original.batch_first
        if original._qkv_same_embed_dim:
            weights = original.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(
                weight.detach()
                for weight in (
                    original.q_proj_weight, original.k_proj_weight, original.v_proj_weight
                )
            )  # fmt: skip
        biases: tuple[torch.Tensor | None, ...] = (None, None, None)
        if original.in_proj_bias is not None:
            biases = original.in_proj_bias.detach().chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        bias = original.out_proj.bias
        self.out_proj = _linear(
            original.out_proj.weight.detach(), None if bias is None else bias.detach()
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
        attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """See `nn.MultiheadAttention`; weights are computed beside the result where asked for.

        Args:
            query: `[B, L, E]`; `[L, B, E]` without `batch_first`, `[L, E]` without a batch.
            key, value: the same with S.
            key_padding_mask: `[B, S]`, true where a key is not looked at, or what is added.
            need_weights: whether the second result is given, `[B, L, S]`.
            attn_mask: `[L, S]` or `[B * H, L, S]`, in the same two forms.
            average_attn_weights: over the heads; else the weights are `[B, H, L, S]`.
            is_causal: a hint that `attn_mask` is the causal one, which is not needed here.
        """
        del is_causal
        is_single = query.dim() == 2
        if is_single:
            query, key, value = query[None], key[None], value[None]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        q = self._heads(self.query(query))
        k, v = self._heads(self.key(key)), self._heads(self.value(value))
        mask = self._mask(attn_mask, key_padding_mask, q.shape[0], q.dtype)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = weights.mean(1) if average_attn_weights else weights
        if is_single:
            return result[0], None if weights is None else weights[0]
        return result if self.batch_first else result.transpose(0, 1), weights

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, E]` to `[B, H, N, D]`."""
        num_samples, length, _ = tokens.shape
        return tokens.reshape(num_samples, length, self.num_heads, -1).transpose(1, 2)

    def _mask(
        self, mask: torch.Tensor | None, padding: torch.Tensor | None, num_samples: int,
        dtype: torch.dtype,
    ) -> torch.Tensor | None:  # fmt: skip
        """What is added to the scores `[B, H, L, S]`, or None."""
        total: torch.Tensor | None = None
        if mask is not None:
            total = _added(mask, dtype)
            if total.dim() == 3:
                total = total.reshape(num_samples, self.num_heads, *total.shape[1:])
        if padding is not None:
            keys = _added(padding, dtype)[:, None, None, :]
            total = keys if total is None else total + keys
        return total


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    arguments: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **arguments)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.eval()


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of truth values (true: not looked at) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
