"""Attention whose two products, QK and PV, run in eight bits.

What: queries, keys, probabilities and values are rounded as the format says, and the softmax stays
in floating point. Every scale is one static number a tensor, which is what runtimes fuse around a
product of two activations.

    S = round(Q) round(K - mean(K))' * scale,  E = exp(S - max(S))
    fp8:  O = round(E) round(V) / sum(round(E))
    int8: O = (round(E - 1/2) + 1/2) round(V) / sum(E)
    int8_fp8: S as in int8, O as in fp8
    int8_keep: S as in int8, O = softmax(S) V

Source: SageAttention (Zhang et al., https://arxiv.org/abs/2410.02367), whose first form keeps PV
in floating point, which runtimes on CPUs fuse with the softmax; for INT8 scores with FP8
values SageAttention2 (https://arxiv.org/abs/2411.10958). Taking the mean of the keys
over tokens off every key adds the same number to all scores of a query, which the softmax ignores;
channels of keys that are large for every token then no longer set the scale. Probabilities are
rounded before they are divided by their sum, as there: the largest of a row is then 1, whatever
the number of tokens.
What we changed: scales are static, since runtimes fuse no others; whether keys are smoothed is
decided for each attention on calibration clips, since it costs precision where keys have no such
channels; INT8 probabilities, from 0 to 1, are centred, so that they use all 255 codes with a zero
point of zero, and the half is added again as half the sum of the values, which is exact; FP8
probabilities are divided by the sum of what they were rounded to, since those of a flat row are all
rounded the same way.

Shapes: B sequences, H heads, L queries, S keys, D width of a head, F width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from vcompress.compress.numerics import fp8, int8
from vcompress.spec.attention_section import PRODUCT_FORMATS, AttentionChoice
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT

__all__ = ["FIRST_OPERAND", "OPERANDS", "AttentionProducts", "attend_plainly"]

# The one that a call rounds before all others.
FIRST_OPERAND = "key"
OPERANDS = ("query", "key", "probability", "value")
# Scores are held for so many pairs of tokens at once, 1 GiB of float32; an export holds all.
_MAX_SCORES = 2**28


class AttentionProducts(nn.Module):
    """Stands in place of `scaled_dot_product_attention`.

    Not in the `state_dict`: `query_scale`, `key_scale`, `probability_scale` and `value_scale`,
    0-dim float32. They move with the module and keep their type.
    """

    query_scale: torch.Tensor
    key_scale: torch.Tensor
    probability_scale: torch.Tensor
    value_scale: torch.Tensor

    def __init__(self, choice: AttentionChoice) -> None:
        """Take format and ranges from `choice`, which keeps nothing."""
        super().__init__()
        self.format = choice.format
        self.smooth_keys = choice.smooth_keys
        scores, mixed = PRODUCT_FORMATS[choice.format]
        self.formats = dict(zip(OPERANDS, (scores, scores, mixed, mixed), strict=True))
        # FP8 probabilities go up to 1, INT8 ones from -1/2 to 1/2; kept ones read no scale.
        largest = 1.0 if mixed == "fp8" else 0.5
        ranges = (choice.query_amax, choice.key_amax, largest, choice.value_amax)
        for operand, amax in zip(OPERANDS, ranges, strict=True):
            assert amax is not None
            scale_of = fp8.input_scale if self.formats[operand] == "fp8" else int8.input_scale
            self.register_buffer(f"{operand}_scale", scale_of(amax), persistent=False)

    def rounded(self, operand: str, x: torch.Tensor) -> torch.Tensor:
        """`x` as the format can hold it; `operand` is one of `OPERANDS`."""
        scale = getattr(self, f"{operand}_scale")
        if self.formats[operand] == "fp8":
            values: torch.Tensor = fp8.quantize_dequantize(x, scale)
            return values
        values = int8.quantize_dequantize(x, scale, 0)
        return values

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Query `[..., L, D]`, key `[..., S, D]` and value `[..., S, F]` to `[..., L, F]`.

        The arguments are those of `scaled_dot_product_attention`.

        Raises:
            InputError: scores are dropped at random, as in training.
        """
        if dropout_p > 0:
            message = f"quantized attention cannot drop scores, got dropout_p={dropout_p}; use eval"
            raise InputError(message)
        if enable_gqa:
            key, value = (
                part.repeat_interleave(query.shape[-3] // part.shape[-3], -3)
                for part in (key, value)
            )
        if self.smooth_keys:
            key = key - key.mean(-2, keepdim=True)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        # Transposed first: in a graph nothing may stand between rounding and product.
        keys = self.rounded("key", key.transpose(-1, -2))
        kept = self.formats["value"] == FLOAT
        values = value if kept else self.rounded("value", value)
        queries = self.rounded("query", query)
        if is_causal:
            size = query.shape[-2], key.shape[-2]
            attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()

        def attended(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            scores = (rows @ keys).float() * factor
            return self._weighted(_masked(scores, mask), values).to(query.dtype)

        return _by_rows(attended, queries, attn_mask, key.shape[-2])

    def _weighted(self, scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scores `[..., L, S]`, float32, and rounded values `[..., S, F]` to `[..., L, F]`."""
        values = values.float()
        if self.formats["probability"] == FLOAT:
            return scores.softmax(-1) @ values
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        if self.formats["probability"] == "fp8":
            weights = self.rounded("probability", weights)
            return (weights @ values) / weights.sum(-1, keepdim=True)
        total = weights.sum(-1, keepdim=True)
        centred = self.rounded("probability", weights - 0.5)
        return (centred @ values + 0.5 * values.sum(-2, keepdim=True)) / total

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device; scales are always float32."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device=fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        """Format, for `print(module)`."""
        return f"format={self.format}, smooth_keys={self.smooth_keys}"


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`scaled_dot_product_attention` itself, which no function mode around the call sees."""
    with torch._C.DisableTorchFunction():
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask


def _by_rows(
    attended: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    queries: torch.Tensor, mask: torch.Tensor | None, num_keys: int,
) -> torch.Tensor:  # fmt: skip
    """`attended(queries, mask)`, a few queries at a time where all scores would be too many."""
    exporting = torch.compiler.is_exporting()
    if exporting or queries[..., 0].numel() * num_keys <= _MAX_SCORES:
        return attended(queries, mask)
    rows = max(1, _MAX_SCORES // (queries[..., 0, 0].numel() * num_keys))
    parts = []
    for start in range(0, queries.shape[-2], rows):
        stop = start + rows
        # A mask of one row stands for all.
        each = mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]
        parts.append(attended(queries[..., start:stop, :], each))
    return torch.cat(parts, -2)
