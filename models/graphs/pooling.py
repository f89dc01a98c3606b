"""Pooling as ONNX defines it: padding that need not be the same on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["average_pool", "global_average_pool", "max_pool", "paddings"]


def paddings(
    auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[int], kernel: Sequence[int],
    strides: Sequence[int], dilations: Sequence[int],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """What is added before and behind each axis, from `auto_pad` or `pads`."""
    count = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        small, large = [total // 2 for total in totals], [-(-total // 2) for total in totals]
        return (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    if auto_pad == "VALID" or not pads:
        return [0] * count, [0] * count
    return list(pads[:count]), list(pads[count:])


def _padded(x: torch.Tensor, before: list[int], after: list[int], value: float) -> torch.Tensor:
    if not any(before) and not any(after):
        return x
    amounts = [amount for pair in zip(before[::-1], after[::-1], strict=True) for amount in pair]
    return functional.pad(x, amounts, value=value)


def _ceiling(
    sizes: Sequence[int], before: list[int], after: list[int], kernel: Sequence[int],
    strides: Sequence[int], dilations: Sequence[int],
) -> list[int]:  # fmt: skip
    """More padding behind, so that the last window that begins inside is counted."""
    extended = []
    for size, low, high, width, stride, dilation in zip(
        sizes, before, after, kernel, strides, dilations, strict=True
    ):
        span = dilation * (width - 1) + 1
        steps = -(-(size + low + high - span) // stride)
        if steps * stride >= size + low:
            steps -= 1
        extended.append(max(high, steps * stride + span - size - low))
    return extended


def max_pool(
    x: torch.Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None, ceil_mode: int = 0,
    auto_pad: str = "NOTSET", storage_order: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The largest in each window."""
    count = len(kernel_shape)
    steps, gaps = strides or [1] * count, dilations or [1] * count
    sizes = x.shape[2:]
    before, after = paddings(auto_pad, pads, sizes, kernel_shape, steps, gaps)
    if ceil_mode:
        after = _ceiling(sizes, before, after, kernel_shape, steps, gaps)
    x = _padded(x, before, after, -math.inf)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[count - 1]
    result: torch.Tensor = pool(x, list(kernel_shape), list(steps), 0, list(gaps))
    return result


def average_pool(
    x: torch.Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None, ceil_mode: int = 0,
    auto_pad: str = "NOTSET", count_include_pad: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The mean of each window; padding counts where `count_include_pad` says so."""
    count = len(kernel_shape)
    steps = strides or [1] * count
    if dilations is not None and any(one != 1 for one in dilations):
        message = "AveragePool with dilations"
        raise NotImplementedError(message)
    sizes = x.shape[2:]
    before, after = paddings(auto_pad, pads, sizes, kernel_shape, steps, [1] * count)
    extra = _ceiling(sizes, before, after, kernel_shape, steps, [1] * count) if ceil_mode else after
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[count - 1]
    size = list(kernel_shape)
    means: torch.Tensor = pool(_padded(x, before, extra, 0.0), size, list(steps))
    if not any(before) and not any(extra):
        return means
    # The share of each window that counts.
    ones = torch.ones_like(x[:1, :1])
    inside = _padded(ones, before, after, 1.0) if count_include_pad else ones
    low = [0] * count if count_include_pad else before
    high = [end - own for end, own in zip(extra, after, strict=True)]
    shares: torch.Tensor = pool(
        _padded(inside, low, high if count_include_pad else extra, 0.0), size, list(steps)
    )
    return means / shares


def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    """The mean of each channel."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)
