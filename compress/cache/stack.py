"""The blocks of a denoiser, found without running it."""

from __future__ import annotations

from itertools import chain

from torch import nn

from vcompress.models.structure import find_blocks
from vcompress.spec.errors import InputError
from vcompress.spec.plan import LayerFacts
from vcompress.spec.strict_json import nearest

__all__ = ["find_stack"]


def find_stack(module: nn.Module, names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Full names of the blocks of the main stack, in the order of the module.

    Of all lists of like modules that hold layers, those nearest to the root: blocks that refine a
    text embedding first lie deeper.

    Args:
        module: a denoiser.
        names: blocks that a person chose; checked and returned.

    Raises:
        InputError: a name that does not exist.
    """
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            message = f"cache.blocks: no module {name!r}{nearest(name, known)}"
            raise InputError(message)
    if names:
        return names
    layers = {
        name: LayerFacts(kind="linear", weight_shape=tuple(matrices[0]))
        for name, matrices in ((name, _matrices(child)) for name, child in known.items())
        if matrices
    }
    found = find_blocks(module, layers)
    depth = min((name.count(".") for name in found), default=0)
    return tuple(name for name in found if name.count(".") == depth)


def _matrices(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of a leaf's own matrices, packed or not."""
    if any(True for _ in module.children()):
        return []
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return [tuple(tensor.shape) for tensor in own if tensor.ndim >= 2]
