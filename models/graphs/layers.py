"""Linears and convolutions as modules, from the tensors and attributes of a graph's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

__all__ = ["convolution", "linear"]

_Layer = TypeVar("_Layer", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """`x @ weight.T + bias`, weight `[N, K]`."""
    # On meta, nothing is drawn at random for what is replaced at once.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(layer, weight, bias)


def convolution(
    weight: torch.Tensor, bias: torch.Tensor | None, *, strides: Sequence[int] | None = None,
    padding: Sequence[int] | str | None = None, dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> nn.Module:  # fmt: skip
    """A convolution with weight `[N, K / groups, ...]` and the same padding on both sides."""
    count = weight.ndim - 2
    layer = _CONVOLUTIONS[count - 1](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=tuple(strides or [1] * count),  # type: ignore[arg-type]
        padding=padding if isinstance(padding, str) else tuple(padding or [0] * count),  # type: ignore[arg-type]
        dilation=tuple(dilations or [1] * count),  # type: ignore[arg-type]
        groups=groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    return _filled(layer, weight, bias)


def _filled(layer: _Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> _Layer:
    layer.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float().contiguous(), requires_grad=False)
    return layer
