"""Which layers of a block change their inputs, and what a block is given and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vcompress.compress.frozen import FrozenLinear
from vcompress.spec.dynamic_section import STORED
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT

__all__ = ["carried", "changing_layers", "hidden_of", "input_bits", "output_channels"]

_HIDDEN = "hidden_states"
_FOUR_BITS = ("nvfp4", "mxfp4")
_EIGHT_BITS = ("int8", "int8_token", "fp8", "fp8_channel", "mxfp8")


def changing_layers(module: nn.Module, blocks: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """The NVFP4 layers of each block, by full name.

    Raises:
        InputError: a block has none.
    """
    found = {}
    for block in blocks:
        own = module.get_submodule(block).named_modules()
        found[block] = tuple(
            f"{block}.{name}" if name else block
            for name, layer in own
            if isinstance(layer, FrozenLinear) and layer.format == STORED
        )
        if not found[block]:
            message = (
                f"dynamic_precision.blocks: {block} has no layer in {STORED}, so nothing can "
                "change there; take it out"
            )
            raise InputError(message)
    return found


def hidden_of(positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden stream among the arguments of a block: the named one, else the first tensor."""
    named = keywords.get(_HIDDEN)
    if isinstance(named, torch.Tensor):
        return named
    values = (*positional, *keywords.values())
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def carried(output: Any, entering: torch.Tensor) -> torch.Tensor | None:
    """The first output of the shape of `entering`."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    tensors = (each for each in outputs if isinstance(each, torch.Tensor))
    return next((each for each in tensors if each.shape == entering.shape), None)


def output_channels(layer: nn.Linear | FrozenLinear) -> int:
    """Of a linear layer, packed or not."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    # Codes and the scales of blocks have a row for each; a scale of the whole weight has none.
    return next(part.shape[0] for part in layer.stored_weight.values() if part.ndim > 1)


def input_bits(layer: nn.Module) -> int:
    """Of what enters the products of `layer`."""
    name = layer.input_format if isinstance(layer, FrozenLinear) else FLOAT
    if name in _FOUR_BITS:
        return 4
    return 8 if name in _EIGHT_BITS else 16
