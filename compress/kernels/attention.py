"""Attention in eight bits on a real kernel: what `compress.attention_products` simulates, executed.

Calls with a mask other than the causal one, and devices without Triton, stay simulated: such a
kernel exists for the common case alone.

Shapes: L queries, S keys, D width of a head, F width of a value.
"""

from __future__ import annotations

import torch

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.kernels.available import interpreted, runs_triton
from vcompress.compress.kernels.operators import rounded_tokens
from vcompress.spec.formats import FLOAT

__all__ = ["ExecutableAttention"]

_CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class ExecutableAttention(AttentionProducts):
    """`AttentionProducts` on a Triton kernel."""

    def __init__(self, products: AttentionProducts) -> None:
        """Share everything with `products`, which is not changed."""
        torch.nn.Module.__init__(self)
        self.format, self.smooth_keys = products.format, products.smooth_keys
        self.formats = products.formats
        for name, buffer in products.named_buffers():
            self.register_buffer(name, buffer, persistent=False)
        self.training = products.training

    @property
    def kernel(self) -> str:
        """What runs where the module is now, for people; "" if it is simulated."""
        if FLOAT in self.formats.values() or not runs_triton(self.query_scale.device):
            return ""
        return f"{self.formats['query']} scores, {self.formats['value']} values, Triton"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """As in `AttentionProducts`."""
        if (
            attn_mask is not None or dropout_p > 0 or enable_gqa or not query.numel()
            or not key.shape[:-2] == value.shape[:-2] == query.shape[:-2]
            or FLOAT in self.formats.values() or not runs_triton(query.device)
        ):  # fmt: skip
            return super().forward(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if self.smooth_keys:
            key = key - key.mean(-2, keepdim=True)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        attended: torch.Tensor = _attend(
            self._codes("query", query), self._codes("key", key),
            self._codes("value", value.transpose(-1, -2)), self.query_scale, self.key_scale,
            self.value_scale, factor, is_causal, query.dtype,
        )  # fmt: skip
        return attended.view(*query.shape[:-1], value.shape[-1])

    def _codes(self, operand: str, x: torch.Tensor) -> torch.Tensor:
        """`[R, ...]`: codes of `x` with its last two axes."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        scale = getattr(self, f"{operand}_scale")
        codes, _ = rounded_tokens(rows, _CODE_TYPES[self.formats[operand]], scale)
        return codes.view(-1, *x.shape[-2:])


@torch.library.custom_op("vcompress::attend", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_scale: torch.Tensor,
    key_scale: torch.Tensor, value_scale: torch.Tensor, factor: float, is_causal: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Codes `[R, L, D]`, `[R, S, D]` and `[R, F, S]` to `[R, L, F]`."""
    from vcompress.compress.kernels import triton_attention

    (heads, num_queries, width), (num_keys, value_width) = query.shape, value.shape[:0:-1]
    # The interpreter cuts off what bfloat16 has no bits for; torch rounds.
    out = query.new_empty(
        (heads, num_queries, value_width), dtype=torch.float32 if interpreted() else out_dtype
    )
    # An E4M3 product takes 32 values of the contraction, as an INT8 one does.
    tiles = {"BLOCK_L": 32, "BLOCK_S": 32} if interpreted() else {"BLOCK_L": 128, "BLOCK_S": 64}
    triton_attention.attention[(-(-num_queries // tiles["BLOCK_L"]), heads)](
        query, key, value, out, query_scale, key_scale, value_scale, factor,
        num_queries, num_keys, width, value_width,
        FLOAT=value.dtype == torch.float8_e4m3fn, CAUSAL=is_causal, INTERPRETED=interpreted(),
        BLOCK_D=_block(width), BLOCK_F=_block(value_width), num_warps=8, **tiles,
    )  # fmt: skip
    return out.to(out_dtype)


@_attend.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_scale: torch.Tensor,
    key_scale: torch.Tensor, value_scale: torch.Tensor, factor: float, is_causal: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return query.new_empty((query.shape[0], query.shape[1], value.shape[1]), dtype=out_dtype)


def _block(size: int) -> int:
    return max(32, 1 << (size - 1).bit_length())
