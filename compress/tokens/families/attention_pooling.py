"""SigLIP: the head that pools the tokens is torch's own multi-head attention.

It does not go through transformers' attention interface; sizes reach its keys as a padding mask of
floats, which torch adds to the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.families.base import Family
from vcompress.models.attention_linears import LinearAttention
from vcompress.models.video import VideoModel

__all__ = ["SIGLIP"]


@dataclass
class _WeighKeys:
    """In front of a multi-head attention over all tokens."""

    state: TokenState

    def __call__(
        self, _attention: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys = inputs[1]
        logs = self.state.log_sizes(keys.shape[1], is_reader=True)
        if logs is None:
            return inputs, keywords
        return inputs, {**keywords, "key_padding_mask": logs.to(keys.dtype)}


def _prepare(model: VideoModel, state: TokenState) -> None:
    for module in model.module.modules():
        if isinstance(module, nn.MultiheadAttention | LinearAttention):
            module.register_forward_pre_hook(_WeighKeys(state), with_kwargs=True)


SIGLIP = Family(prepare=_prepare)
