"""Where the clips of a batch are in what a layer sees: its batch may be frames or windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Layout", "by_clip", "inner_products", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """Where the clips are in a layer's output.

    Attributes:
        axis: along which there are more values the more clips there are.
        interleaved: the first values of all clips come first; otherwise all of the first clip.
    """

    axis: int
    interleaved: bool


def layout_of(output: torch.Tensor, alone: torch.Tensor | None, num_clips: int) -> Layout | None:
    """Where the clips are in `output`, of which `alone` is what the first gives alone.

    A layer may see frames or windows as its batch, or have the tokens first. None where the clips
    cannot be told apart.
    """
    if num_clips == 1:
        return Layout(0, interleaved=False)
    if alone is None or alone.ndim != output.ndim:
        return None
    axes = [axis for axis in range(output.ndim) if output.shape[axis] != alone.shape[axis]]
    if len(axes) != 1 or output.shape[axes[0]] != num_clips * alone.shape[axes[0]]:
        return None
    rows, first = output.detach().movedim(axes[0], 0), alone.movedim(axes[0], 0)
    tolerance = 1e-3 * float(first.abs().max()) if first.numel() else 0.0
    for interleaved, part in ((False, rows[: len(first)]), (True, rows[::num_clips])):
        if torch.allclose(part, first, rtol=0, atol=tolerance):
            return Layout(axes[0], interleaved)
    return None


def by_clip(tensor: torch.Tensor, num_clips: int, layout: Layout | None) -> torch.Tensor:
    """`tensor` as float32 `[num_clips, -1]`; `[1, -1]` where clips cannot be told apart."""
    if layout is None:
        return tensor.float().reshape(1, -1)
    rows = tensor.float().movedim(layout.axis, 0)
    if layout.interleaved:
        rows = rows.reshape(-1, num_clips, *rows.shape[1:]).transpose(0, 1)
    return rows.reshape(num_clips, -1)


def inner_products(rows: torch.Tensor, change: torch.Tensor, num_clips: int) -> torch.Tensor:
    """Inner products of `rows` `[C, P, M]` with `change` `[C, M]`: float64 `[P, num_clips]`.

    Where clips cannot be told apart, C is 1, the whole sum goes to the first clip: probes of
    different clips are independent, so that the square of the sum has the right mean.
    """
    # In this order MKL is ten times as fast as in the other.
    products = torch.bmm(change.unsqueeze(1), rows.transpose(1, 2)).squeeze(1)
    products = products.t().double().cpu()
    if products.shape[1] == num_clips:
        return products
    result = torch.zeros(len(products), num_clips, dtype=torch.float64)
    result[:, :1] = products
    return result
