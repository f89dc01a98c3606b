"""Calibrated tensors: what an algorithm hands to the layers beside the plan, and its file.

A layer's tensors are called by part:

| part | shape | what it is |
|---|---|---|
| `input_smoothing` | [K] | the input is multiplied by it, the weight was divided by it |
| `low_rank_down`, `low_rank_up` | [R, K], [N, R] | a float branch, taken off the weight |
| `bias` | [N] | in place of the layer's bias |
| `weight_...` | as the format has it | the stored weight, named as in a frozen layer |

Under the name `tokens` stand `readout_weight` [N, K] and `readout_bias` [N] of the plan's section
of that name (see `compress.tokens.readout`), and `centers_BLOCK` [P, D] of its fitted techniques
(see `compress.tokens.techniques.centroids`; P centres, D width of a key).

Shapes: N output channels, K input channels, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from vcompress.spec.errors import InputError
from vcompress.spec.plan import TENSOR_WORDS

__all__ = [
    "TOKENS",
    "WEIGHT_PREFIX",
    "LayerTensors",
    "ModelTensors",
    "flatten",
    "select",
    "unflatten",
    "words",
]

LayerTensors = Mapping[str, torch.Tensor]
# By the full name of the layer.
ModelTensors = Mapping[str, LayerTensors]

WEIGHT_PREFIX = "weight_"
TOKENS = "tokens"
_SEPARATOR = ":"


def words(parts: Collection[str]) -> tuple[str, ...]:
    """The words of a plan's line that stand for all of `parts`."""
    return tuple(
        word
        for word, wanted in TENSOR_WORDS.items()
        if any(part in wanted or (word == "weight" and _is_weight(part)) for part in parts)
    )


def select(tensors: LayerTensors, chosen: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of `tensors` that the words `chosen` of a plan's line stand for."""
    return {part: tensor for part, tensor in tensors.items() if set(words([part])) & set(chosen)}


def flatten(tensors: ModelTensors) -> dict[str, torch.Tensor]:
    """All tensors by `layer:part`, contiguous, as a file of tensors takes them."""
    return {
        f"{layer}{_SEPARATOR}{part}": tensor.detach().contiguous()
        for layer, parts in tensors.items()
        for part, tensor in parts.items()
    }


def unflatten(flat: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `flatten`.

    Raises:
        InputError: a name that is not `layer:part` with a known part.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        layer, separator, part = name.rpartition(_SEPARATOR)
        if not separator or not (words([part]) or layer == TOKENS):
            message = (
                f"{name!r} is not layer{_SEPARATOR}part with a part that is known here; make the "
                "plan again with this version"
            )
            raise InputError(message)
        tensors.setdefault(layer, {})[part] = tensor
    return tensors


def _is_weight(part: str) -> bool:
    return part.startswith(WEIGHT_PREFIX)
