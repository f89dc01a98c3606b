"""Which layers of a block change their inputs, and what a block is given and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vcompress.compress.frozen import FrozenLinear
from vcompress.spec.dynamic_section import STORED
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.strict_json import nearest

__all__ = ["carried", "changing_layers", "hidden_of", "input_bits", "output_channels"]

_HIDDEN = "hidden_states"
# An input that is left as it is counts as one of half precision, which denoisers run in.
_WHOLE_BITS = 16


def changing_layers(module: nn.Module, blocks: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """The NVFP4 layers of each block, by full name.

    Raises:
        InputError: there is no such block, it has no such layer, or one that is not simulated.
    """
    known = dict(module.named_modules())
    found = {}
    for block in blocks:
        if block not in known:
            message = f"dynamic_precision.blocks: no module {block!r}{nearest(block, known)}"
            raise InputError(message)
        own = {
            f"{block}.{name}" if name else block: layer
            for name, layer in known[block].named_modules()
            if isinstance(layer, FrozenLinear) and layer.format == STORED
        }
        if not own:
            message = (
                f"dynamic_precision.blocks: {block} has no layer in {STORED}, so nothing can "
                "change there; take it out"
            )
            raise InputError(message)
        executed = next((name for name, layer in own.items() if not layer.is_simulated), None)
        if executed is not None:
            message = (
                f"dynamic precision is simulated in torch only, {executed} runs on a kernel of one "
                "precision; apply it to the module as it was before execute"
            )
            raise InputError(message)
        found[block] = tuple(own)
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
    """Of what enters the products of `layer`, without scales."""
    known = FORMATS.get(layer.input_format) if isinstance(layer, FrozenLinear) else None
    # A block scale adds a fraction; formats whose input stays as it is have none.
    return (int(known.input_bits) if known else 0) or _WHOLE_BITS
