"""What a family may add to the surgery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vcompress.compress.tokens.attention import TokenState
from vcompress.models.video import VideoModel

__all__ = ["Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Additions of one family.

    Attributes:
        prepare: changes the model in place before hooks are set; may replace blocks by written
            ones that keep the names of their layers.
        uses_attention_interface: whether its attention can be exchanged through transformers; if
            not, `prepare` sees to it that `TokenState.inputs` is filled and sizes are weighed.
    """

    prepare: Callable[[VideoModel, TokenState], None] | None = None
    uses_attention_interface: bool = True
