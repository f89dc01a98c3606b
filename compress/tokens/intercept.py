"""Attention over fewer tokens, in place of the one that a module calls.

While an attention module runs, its calls of `scaled_dot_product_attention` pass through a function
mode, which merges tokens before and puts them back after. No processor is copied, and any that
calls that function works, also under `torch.export`.

Matching reads queries and keys as the attention gets them, after rotary positions, so it sees what
the scores see. Every head matches for itself: its scores depend on its own channels alone, and an
average over heads merges what one of them tells apart.

Shapes: B sequences, H heads, N video tokens, S text tokens, K tokens that are kept, D width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vcompress.compress.tokens.attention import proportional_fused
from vcompress.compress.tokens.windows import Distance, GridWindows, WindowReduction
from vcompress.spec.errors import InputError

__all__ = ["Intercept", "Merging"]


@dataclass(frozen=True, kw_only=True)
class Merging:
    """How much is merged.

    Attributes:
        keep_queries, keep_keys: shares of the video tokens, in (0, 1].
        distance: see `windows`.
        attention: a name in `spec.token_section.ATTENTIONS`.
    """

    keep_queries: float
    keep_keys: float
    distance: Distance
    attention: str


class Intercept(TorchFunctionMode):
    """Active during one call of one attention module.

    Args:
        name: of the module, for messages.
        windows: of the raster of video tokens.
        merging: how much.
        num_text: S of the text that the module was given; None if it was given none.

    Attributes:
        consulted: whether attention was called at all.
        reduced: whether a call was reduced.
    """

    def __init__(
        self, name: str, windows: GridWindows, merging: Merging, num_text: int | None
    ) -> None:
        super().__init__()
        self._name, self._windows, self._merging = name, windows, merging
        self._num_text = num_text
        self._text_sides: set[str] = set()
        self.consulted = self.reduced = False

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.consulted = True
            return self._attend(*args, **kwargs)
        if func is torch.cat:
            self._note_sides(*args, **kwargs)
        return func(*args, **kwargs)

    def _note_sides(self, tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> None:
        """Remember whether the module joins text and video, and which it puts first."""
        axes = {dim % max(1, tensor.ndim) - tensor.ndim for tensor in tensors}
        # Channels are joined too, and their numbers say nothing.
        if not self._num_text or len(tensors) != 2 or max(axes) >= -1:
            return
        lengths = [tensor.shape[dim] for tensor in tensors]
        if lengths == [self._num_text, self._windows.num_tokens]:
            self._text_sides.add("first")
        if lengths == [self._windows.num_tokens, self._num_text]:
            self._text_sides.add("last")

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """What `scaled_dot_product_attention` is asked for, on fewer tokens."""
        if self._num_text is not None and key.shape[-2] <= self._num_text:
            # Keys of text, or of a part of it: cross-attention.
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        self._check_lengths(query.shape[-2], key.shape[-2])
        self._check_kind(attn_mask, dropout_p, is_causal, query.shape[1] != key.shape[1])
        self.reduced = True
        (text_query, asking), (text_key, keys) = self._split(query), self._split(key)
        text_value, values = self._split(value)
        reduction = None
        if self._merging.keep_queries < 1:
            asking, reduction = self._merge_queries(asking)
        logs = None
        if self._merging.keep_keys < 1:
            keys, values, sizes = self._merge_keys(keys, values)
            ones = torch.ones_like(text_key[..., 0], dtype=sizes.dtype)
            logs = (
                None if self._merging.attention == "plain" else torch.cat([ones, sizes], -1).log()
            )
        output = _weighted_attention(
            _joined(text_query, asking), _joined(text_key, keys), _joined(text_value, values), logs,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            is_fused=self._merging.attention == "proportional_fused",
        )  # fmt: skip
        num_text = text_query.shape[-2]
        text, video = output[..., :num_text, :], output[..., num_text:, :]
        if reduction is not None:
            restored = reduction.restore(video.flatten(0, 1))
            video = self._windows.rearrange(_by_head(restored, video))
        return _joined(video, text) if self._text_sides == {"last"} else _joined(text, video)

    def _merge_queries(self, queries: torch.Tensor) -> tuple[torch.Tensor, WindowReduction]:
        """`[B, H, N, D]` to `[B, H, K, D]`, and how to put results back."""
        rows = self._windows.arrange(queries).flatten(0, 1)
        reduction = self._windows.match(rows, self._merging.keep_queries, self._merging.distance)
        merged, _ = reduction.apply(rows)
        return _by_head(merged, queries), reduction

    def _merge_keys(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, N, D]` to `[B, H, K, D]`, and how many each stands for."""
        width = keys.shape[-1]
        rows = self._windows.arrange(torch.cat([keys, values], -1)).flatten(0, 1)
        reduction = self._windows.match(
            rows[..., :width], self._merging.keep_keys, self._merging.distance
        )
        merged, sizes = reduction.apply(rows)
        merged = _by_head(merged, keys)
        return merged[..., :width], merged[..., width:], _by_head(sizes, keys)

    def _split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, H, S + N, D]` to text, possibly none of it, and video."""
        count = self._windows.num_tokens
        if self._text_sides == {"last"}:
            return tokens[..., count:, :], tokens[..., :count, :]
        num_text = tokens.shape[-2] - count
        return tokens[..., :num_text, :], tokens[..., num_text:, :]

    def _check_lengths(self, num_queries: int, num_keys: int) -> None:
        count, num_text = self._windows.num_tokens, self._num_text or 0
        grid = " x ".join(map(str, self._windows.grid))
        if num_queries != num_keys or num_queries not in (count, count + num_text):
            message = (
                f"{self._name} attends from {num_queries} over {num_keys} tokens, but the grid "
                f"{grid} has {count}{f' beside {num_text} of text' if num_text else ''}; give the "
                "grid of the latent after patches were made; attention over space and time in "
                "turn, or over windows, cannot be reduced"
            )
            raise InputError(message)
        if num_queries != count and len(self._text_sides) != 1:
            message = (
                f"{self._name} attends over text and video together, and where the {num_text} "
                f"tokens of text stand among the {num_queries} cannot be told; it is seen only "
                "where a module joins the two itself, and they differ in length"
            )
            raise InputError(message)

    def _check_kind(
        self, mask: torch.Tensor | None, dropout: float, is_causal: bool, is_grouped: bool
    ) -> None:
        """A mask or an order says of each token whom it may ask, which merged ones cannot obey."""
        reasons = [
            reason
            for reason, holds in (
                ("has a mask", mask is not None),
                ("is causal", is_causal),
                ("drops scores at random (training)", dropout > 0),
                ("shares keys between heads", is_grouped),
            )
            if holds
        ]
        if reasons:
            message = f"{self._name} cannot be reduced: its attention {' and '.join(reasons)}"
            raise InputError(message)


def _weighted_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logs: torch.Tensor | None, *,
    scale: float, is_fused: bool,
) -> torch.Tensor:  # fmt: skip
    """Attention over `[B, H, M, D]` with `logs` `[B, H, M]` added to the scores of each key."""
    if logs is None:
        return functional.scaled_dot_product_attention(query, key, value, scale=scale)
    if not is_fused:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=logs[:, :, None].to(query.dtype), scale=scale
        )
    # Sizes differ from head to head, so each is a sequence of its own here.
    rows = [part.flatten(0, 1)[:, None] for part in (query, key, value)]
    output = proportional_fused(rows[0], rows[1], rows[2], logs.flatten(0, 1), scale)
    return _by_head(output.squeeze(1), query)


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Tokens in one sequence; not copied where one of the two is none."""
    if first.shape[-2] == 0 or second.shape[-2] == 0:
        return second if first.shape[-2] == 0 else first
    return torch.cat([first, second], -2)


def _by_head(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B * H, ...]` to `[B, H, ...]`, as many as `like` has."""
    return rows.reshape(*like.shape[:2], *rows.shape[1:])
