"""Block Hadamard rotation of a layer's input: which sizes a layer can take.

What: the input is rotated online, in blocks, before it is rounded, and the weight was rotated
beforehand; the product stays the same, while an outlier is spread over its block.
Source: QuaRot (Ashkboos et al., https://arxiv.org/abs/2404.00456); in blocks, for diffusion
transformers, ConvRot (https://arxiv.org/abs/2512.03673).
What we changed: no rotation is folded into a neighbouring layer, since what stands between (AdaLN's
modulation, an activation function) does not commute with it. The matrix is Sylvester's, see
`numerics.hadamard`.
"""

from __future__ import annotations

__all__ = ["SIZES", "largest_size", "sizes"]

SIZES = (16, 32, 64, 128)


def sizes(num_channels: int) -> tuple[int, ...]:
    """The block sizes, ascending, that a layer with `num_channels` inputs can take."""
    return tuple(size for size in SIZES if num_channels % size == 0)


def largest_size(num_channels: int) -> int | None:
    """The largest of them, which spreads outliers furthest; None if there is none."""
    return max(sizes(num_channels), default=None)
