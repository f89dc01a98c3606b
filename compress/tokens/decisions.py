"""Where arithmetic becomes a choice: which token goes, and which one it joins.

Two correct runtimes differ in the last bits of a likeness. Among tokens that are all but the same,
such as those of a resting background, that turns a choice over, and another choice is another
model: the outputs differ by as much as a merge does. So every choice passes through one operator,
which changes nothing, is written into the exported graph as an Identity, and lets `export.replay`
read the choices of a file, put them in place of torch's, and check that the two are worth the same.

Shapes: any leading axes `...`, N scores, K places.
"""

from __future__ import annotations

import torch

__all__ = ["decided", "most_alike_of"]


@torch.library.custom_op("vcompress::decided", mutates_args=())
def decided(places: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`places` as they are.

    Args:
        places: int64 `[..., K]`, chosen by `scores`.
        scores: `[..., N]`; any two choices whose scores are equal are equally right.
    """
    del scores
    return places.clone()


@decided.register_fake
def _(places: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    del scores
    return torch.empty_like(places)


def most_alike_of(likeness: torch.Tensor) -> torch.Tensor:
    """The place of the largest in each row of `likeness` `[..., r, N]`: int64 `[..., r]`."""
    places: torch.Tensor = decided(likeness.argmax(dim=-1, keepdim=True), likeness)
    return places[..., 0]
