"""What a frozen layer is made of: a layer and its calibrated tensors, checked and put together.

What: the tensors of `compress.tensors` are compared with the layer that they are for, and the
weight is brought into the form that gets rounded.

Shapes: N output channels, K input channels, R rank, B size of a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vcompress.compress.numerics import hadamard
from vcompress.compress.stored import CODECS, as_bytes, check_stored
from vcompress.compress.tensors import WEIGHT_PREFIX, LayerTensors, words
from vcompress.models.structure import is_plain
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

__all__ = ["Convolution", "Layer", "Prepared", "checked_layer", "prepare", "weight_to_store"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution

# Rounding and its compensation move a weight by far less than its own size, a weight of another
# layer or of another rotation by sqrt(2) of it.
_LARGEST_STORED_ERROR = 1.2


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What goes into a frozen layer.

    Attributes:
        weight: buffers of the stored weight.
        input_scale: 0-dim float32, or None if the input has no static scale.
        input_smoothing: float32 `[K]`, or None.
        low_rank: `[R, K]` and `[N, R]` in the type that they were given in, or None.
        rotation: float32 `[B, B]`, or None.
        bias: float32 `[N]`, or None.
    """

    weight: Mapping[str, torch.Tensor]
    input_scale: torch.Tensor | None
    input_smoothing: torch.Tensor | None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None
    rotation: torch.Tensor | None
    bias: torch.Tensor | None


def prepare(
    layer: Layer, format: str, input_amax: float | None, rotation: int | None,
    tensors: LayerTensors, what: str,
) -> Prepared:  # fmt: skip
    """Check everything and round the weight, unless `tensors` has it; see `frozen.freeze`.

    Raises:
        InputError: a tensor, the rotation or `input_amax` does not fit the layer or the format.
    """
    codec, device = CODECS[format], layer.weight.device
    unknown = [part for part in tensors if not words([part])]
    if unknown:
        message = f"{what}: unknown tensors {', '.join(unknown)}; see compress.tensors"
        raise InputError(message)
    scale = None
    if codec.input_scale is not None:
        if input_amax is None:
            message = (
                f"{what}: {format} needs input_amax, which calibration did not see; use clips that "
                "reach the layer, or keep it"
            )
            raise InputError(message)
        scale = codec.input_scale(input_amax).to(device)
    exact = weight_to_store(layer, rotation, tensors, what)
    stored = {part: tensor for part, tensor in tensors.items() if part.startswith(WEIGHT_PREFIX)}
    if stored:
        stored = {
            part: as_bytes(tensor.detach().clone().to(device)) for part, tensor in stored.items()
        }
        check_stored(stored, format, tuple(exact.shape), what)
        _check_stored_values(codec.dequantize(stored), exact, what)
    else:
        stored = codec.quantize(exact, what)
    low_rank, smoothing = _low_rank(layer, tensors, what), tensors.get("input_smoothing")
    if smoothing is not None:
        smoothing = smoothing.detach().float().clone().to(device)
    return Prepared(
        weight=stored,
        input_scale=scale,
        input_smoothing=smoothing,
        low_rank=None if low_rank is None else (low_rank[0].clone(), low_rank[1].clone()),
        rotation=None if rotation is None else hadamard.matrix(rotation).to(device),
        bias=_bias(layer, tensors, what),
    )  # fmt: skip


def weight_to_store(
    layer: Layer, rotation: int | None, tensors: LayerTensors, name: str
) -> torch.Tensor:
    """The weight that gets rounded, float32: `rotate(W / smoothing - up @ down)`.

    Args:
        layer: is not changed.
        rotation: block size of the Hadamard rotation, or None.
        tensors: `input_smoothing` and the two of the low-rank branch are used, if they are there.
        name: for errors.

    Raises:
        InputError: a tensor or the rotation does not fit the layer.
    """
    weight = layer.weight.detach().float()
    smoothing = tensors.get("input_smoothing")
    if smoothing is not None:
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        _check_smoothing(smoothing, weight.shape[1] * groups, name)
        weight = _divide_columns(weight, smoothing.detach().float().to(weight.device), groups)
    low_rank = _low_rank(layer, tensors, name)
    if low_rank is not None:
        down, up = low_rank
        weight = weight - up.float() @ down.float()
    if rotation is None:
        return weight
    if not isinstance(layer, nn.Linear):
        message = f"{name}: a rotation is defined for linear layers; use none"
        raise InputError(message)
    return hadamard.rotate(weight, rotation)


def checked_layer(layer: nn.Module, format: str, name: str) -> Layer:
    """`layer`, if it can be frozen into `format`.

    Raises:
        InputError: an unknown format; a kind of layer, padding or shape that it does not take.
    """
    kind = _kind(layer, name)
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if format not in FORMATS:
        message = f"unknown format {format!r}; choose one of: {', '.join(FORMATS)}"
        raise InputError(message)
    objection = FORMATS[format].objection(kind, tuple(layer.weight.shape))
    if objection:
        what = f"{name}.weight" if name else f"weight of {layer}"
        message = f"{what}: {objection}; choose another format or keep the layer"
        raise InputError(message)
    return layer


def _kind(layer: nn.Module, name: str) -> str:
    """The layer's kind, as in `spec.formats`."""
    kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
    found = [word for kind, word in kinds.items() if isinstance(layer, kind)]
    if not found:
        message = (
            f"{name or 'the layer'} must be a linear layer or a convolution, got "
            f"{type(layer).__name__}; keep it as it is"
        )
        raise InputError(message)
    if not is_plain(layer):
        message = (
            f"{name or 'the layer'} must be a layer of torch's own, {type(layer).__name__} has a "
            "forward of its own, which would be lost; keep it as it is"
        )
        raise InputError(message)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        message = (
            f"{name or 'the layer'} must pad with zeros to be quantized, its padding_mode is "
            f"{mode!r}; keep it as it is"
        )
        raise InputError(message)
    return found[0]


def _check_smoothing(smoothing: torch.Tensor, num_channels: int, what: str) -> None:
    if smoothing.shape != (num_channels,):
        message = (
            f"{what}: input_smoothing must have one factor for each of the {num_channels} input "
            f"channels, got shape {list(smoothing.shape)}"
        )
        raise InputError(message)
    if not bool((smoothing.isfinite() & (smoothing > 0)).all()):
        message = f"{what}: input_smoothing must be positive and finite; calibrate it again"
        raise InputError(message)


def _divide_columns(weight: torch.Tensor, smoothing: torch.Tensor, groups: int) -> torch.Tensor:
    """Divide `weight` `[N, K / groups, ...]` by the factor `[K]` of each input channel."""
    by_group = weight.view(groups, -1, *weight.shape[1:])
    factors = smoothing.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (by_group / factors).flatten(0, 1)


def _low_rank(
    layer: Layer, tensors: LayerTensors, what: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The branch `[R, K]`, `[N, R]`, if `tensors` has one."""
    down, up = tensors.get("low_rank_down"), tensors.get("low_rank_up")
    if down is None and up is None:
        return None
    if down is None or up is None:
        message = f"{what}: a low-rank branch needs both low_rank_down and low_rank_up"
        raise InputError(message)
    num_outputs, num_inputs = layer.weight.shape[:2]
    rank = down.shape[0] if down.ndim else 0
    fits = (down.shape, up.shape) == ((rank, num_inputs), (num_outputs, rank)) and rank > 0
    if not isinstance(layer, nn.Linear) or not fits:
        message = (
            f"{what}: a low-rank branch is [R, K] and [N, R] of a linear layer, which has weight "
            f"{list(layer.weight.shape)}; got {list(down.shape)} and {list(up.shape)}"
        )
        raise InputError(message)
    _check_finite({"low_rank_down": down, "low_rank_up": up}, what)
    device = layer.weight.device
    return down.detach().to(device), up.detach().to(device)


def _bias(layer: Layer, tensors: LayerTensors, what: str) -> torch.Tensor | None:
    """The bias `[N]` of the frozen layer: that of `tensors`, else that of `layer`."""
    bias = tensors.get("bias", layer.bias)
    if bias is None:
        return None
    if bias.shape != (layer.weight.shape[0],):
        message = (
            f"{what}: bias must have one value for each of the {layer.weight.shape[0]} output "
            f"channels, got shape {list(bias.shape)}"
        )
        raise InputError(message)
    if "bias" in tensors:
        _check_finite({"bias": bias}, what)
    return bias.detach().float().clone().to(layer.weight.device)


def _check_finite(tensors: LayerTensors, what: str) -> None:
    for part, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            message = f"{what}: {part} must be floating-point and finite; calibrate it again"
            raise InputError(message)


def _check_stored_values(stored: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Refuse a stored weight that was made for another layer or rotation."""
    error = torch.linalg.vector_norm(stored - exact)
    # A comparison with NaN is false.
    if not error <= _LARGEST_STORED_ERROR * torch.linalg.vector_norm(exact):
        message = (
            f"{what}: the stored weight is not that of this layer, rotated and smoothed as its "
            "line says; delete the word weight from the layer's tensors, and the weight is "
            "rounded anew"
        )
        raise InputError(message)
