"""Names of weights that differ between versions of transformers, for the image towers.

`from_pretrained` knows them; a state dict in a file of its own comes with the names of the version
that saved it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

__all__ = ["as_the_library_names"]

# Before and since version 5, which also took a level out of CLIP and SigLIP.
_SPELLINGS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.weights_out", "mlp.down_proj"),
)
_LEVEL = "vision_model."
# One matrix before, two since.
_GATED, _GATE, _UP = "mlp.weights_in", "mlp.gate_proj", "mlp.up_proj"


def as_the_library_names(
    state_dict: Mapping[str, torch.Tensor], expected: Collection[str]
) -> dict[str, torch.Tensor]:
    """`state_dict` with the names in `expected`; what fits none of them keeps its name."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        if name.endswith("embeddings.position_ids") and name not in expected:
            # A table of 0, 1, 2, ... that early versions saved.
            continue
        found = next((other for other in _spellings(name) if other in expected), name)
        gate, up = found.replace(_GATED, _GATE), found.replace(_GATED, _UP)
        if found not in expected and gate in expected and up in expected:
            result[gate], result[up] = tensor.chunk(2, dim=0)
        else:
            result[found] = tensor
    return result


def _spellings(name: str) -> Iterator[str]:
    """`name` and all its other spellings."""
    yield name
    yield name.removeprefix(_LEVEL)
    yield _LEVEL + name
    for before, since in _SPELLINGS:
        yield name.replace(before, since)
        yield name.replace(since, before)
