"""Block Hadamard rotation: spreads outliers over a block before it is quantized.

What: blocks of B neighbours along the last axis are multiplied by the Hadamard matrix of size B,
divided by sqrt(B). The matrix is symmetric and orthogonal: rotating twice gives the input back, and
an input and a weight that are both rotated have the same product as before. An outlier of one value
becomes B values of its size over sqrt(B).
Source: Sylvester's construction; for quantization QuaRot (https://arxiv.org/abs/2404.00456).
What we changed: the rotation is online, inside the layer, and in blocks, so that nothing has to be
folded into neighbours; small blocks keep the scales of block formats local.
"""

from __future__ import annotations

import math

import torch

from vcompress.spec.errors import InputError

__all__ = ["matrix", "rotate", "rotate_by"]


def matrix(size: int) -> torch.Tensor:
    """The Hadamard matrix `[size, size]` divided by sqrt(size), float32.

    Raises:
        InputError: `size` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        message = f"a Hadamard rotation needs a power of two as its size, got {size}; use 16 or 32"
        raise InputError(message)
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs / math.sqrt(size)


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rotate blocks of `size` values of `x` `[..., K]`; its own inverse.

    Raises:
        InputError: `size` is not a power of two, or does not divide K.
    """
    if x.shape[-1] % size:
        message = f"rotation {size} must divide the last axis, which has {x.shape[-1]} values"
        raise InputError(message)
    return rotate_by(x, matrix(size).to(device=x.device))


def rotate_by(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`x` `[..., K]` with each block of B values multiplied by `rotation` `[B, B]`, in its type."""
    size = rotation.shape[0]
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return (blocks @ rotation.to(x.dtype)).reshape(x.shape)
