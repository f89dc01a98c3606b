"""What all formats share: which operands can be quantized, and the range of a scale.

Runtimes flush subnormal numbers, and a scale times the largest code must stay finite. Both hold
when magnitudes are at most `LARGEST_VALUE` and scales at least `SMALLEST_SCALE`; trained weights
lie many orders of magnitude inside.
"""

from __future__ import annotations

import math

import torch

from vcompress.spec.errors import InputError

__all__ = [
    "LARGEST_VALUE", "SMALLEST_SCALE", "check_amax", "check_blocks", "check_matrix",
    "check_matrix_shape", "check_weight", "input_scale", "largest_magnitude", "weight_scale",
]  # fmt: skip

LARGEST_VALUE = 2.0**126
SMALLEST_SCALE = 2.0**-100


def largest_magnitude(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return the amax of `weight`, 0-dim float32, if it can be quantized; makes no copy of it.

    Args:
        weight: `[N, ...]`, output channels first, any floating-point type.
        name: what the error calls it.

    Raises:
        InputError: not floating-point, empty, fewer than two axes, or a value that is not finite
            or above `LARGEST_VALUE`.
    """
    if not weight.is_floating_point():
        message = f"{name} must be floating-point, got {weight.dtype}; quantize the trained weight"
        raise InputError(message)
    if weight.ndim < 2 or weight.numel() == 0:
        message = (
            f"{name} must have output channels and a contraction, none of them empty; got shape "
            f"{list(weight.shape)}; keep the layer as it is"
        )
        raise InputError(message)
    # torch has no arithmetic for eight-bit floats.
    values = weight.detach() if weight.itemsize > 1 else weight.detach().float()
    smallest, largest = torch.aminmax(values)
    amax = torch.maximum(largest, smallest.neg()).float()
    # A comparison with NaN is false, so one test finds NaN, infinities and huge values.
    if not bool(amax <= LARGEST_VALUE):
        raise InputError(_message_of_rejected(weight.detach().float(), name))
    return amax


def _message_of_rejected(weight: torch.Tensor, name: str) -> str:
    rejected = (~(weight.abs() <= LARGEST_VALUE)).nonzero()
    where = tuple(rejected[0].tolist())
    return (
        f"{name} must be finite and at most 2^126 in magnitude; {len(rejected)} of "
        f"{weight.numel()} values are not, the first is {weight[where].item()} at {where}; "
        "repair the checkpoint"
    )


def check_weight(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return `weight` as float32 if it can be quantized.

    Raises:
        InputError: see `largest_magnitude`.
    """
    largest_magnitude(weight, name)
    return weight.detach().float()


def check_blocks(size: int, block_size: int, format: str, what: str) -> None:
    """Raise `InputError` if an axis of `size` values of `what` is not made of whole blocks."""
    if size == 0 or size % block_size:
        message = (
            f"{format} needs a last axis divisible by {block_size} and not empty, {what} has "
            f"{size}; choose another format for the layer"
        )
        raise InputError(message)


def check_matrix_shape(shape: torch.Size, name: str, *, format: str, block_size: int) -> None:
    """Raise `InputError` if `shape` is not `[N, K]` with K made of whole blocks."""
    if len(shape) != 2:
        message = (
            f"{name} must have shape [N, K] for {format}, got {list(shape)}; use int8 or "
            "fp8 for convolutions"
        )
        raise InputError(message)
    check_blocks(shape[1], block_size, format, name)


def check_matrix(weight: torch.Tensor, name: str, *, format: str, block_size: int) -> torch.Tensor:
    """Return `weight` `[N, K]` as float32 if `format` can hold it in blocks along K.

    Raises:
        InputError: see `largest_magnitude`; not two axes; K not divisible by `block_size`.
    """
    weight = check_weight(weight, name)
    check_matrix_shape(weight.shape, name, format=format, block_size=block_size)
    return weight


def check_amax(amax: float, name: str = "input_amax") -> float:
    """Return `amax` if it is the largest magnitude of a finite tensor, else raise `InputError`."""
    if not math.isfinite(amax) or not 0 <= amax <= LARGEST_VALUE:
        message = (
            f"{name} must be a finite number from 0 to 2^126, got {amax}; calibrate again with "
            "clips on which the model's activations are finite"
        )
        raise InputError(message)
    return amax


def weight_scale(amax: torch.Tensor, largest_code: float) -> torch.Tensor:
    """Scale that maps `amax` to `largest_code`; 1.0 where `amax` is 0, as any scale is exact there.

    Args:
        amax: float32, any shape, finite.
        largest_code: largest number that the elements can hold.
    """
    scale = (amax / largest_code).clamp_(min=SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def input_scale(amax: float, largest_code: float) -> torch.Tensor:
    """Static scale of an activation, 0-dim float32.

    With `amax` 0 calibration saw zeros alone, which every scale represents; the scale is then that
    of an `amax` of 1.0, so that a later input of ordinary size is not saturated away.

    Raises:
        InputError: `amax` is negative, not finite or above `LARGEST_VALUE`.
    """
    magnitude = torch.tensor(check_amax(amax) or 1.0, dtype=torch.float32)
    return (magnitude / largest_code).clamp_(min=SMALLEST_SCALE)
