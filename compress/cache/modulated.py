"""What the first layer of a block is given: its input after norm and modulation.

The block runs until a layer is handed a token sequence at least as long as the block's own, and no
further. Layers that see one vector a clip, as those of the modulation do, are passed by.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["first_layer_input"]


class _Reached(BaseException):
    """No error: it ends a block early."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def first_layer_input(
    block: nn.Module, run: Callable[[], Any], tokens: torch.Tensor
) -> torch.Tensor:
    """The input of the first layer that sees all tokens.

    Args:
        block: whose layers are looked at.
        run: calls it.
        tokens: `[..., N, C]`, its hidden stream.

    Returns:
        `[..., M, K]` with M >= N; `tokens` itself if no layer of the block sees them.
    """
    least = tokens.shape[-2]

    def look(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        value = inputs[0] if inputs else None
        if isinstance(value, torch.Tensor) and value.ndim >= 3 and value.shape[-2] >= least:
            raise _Reached(value)

    handles = [
        layer.register_forward_pre_hook(look) for layer in block.modules() if _is_layer(layer)
    ]
    try:
        run()
    except _Reached as reached:
        return reached.value
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a leaf with a matrix of its own, packed or not; norms have vectors."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return not any(True for _ in module.children()) and any(tensor.ndim >= 2 for tensor in own)
