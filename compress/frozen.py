"""Frozen layers: packed weights and scales as buffers, quantization as exportable operators.

What: `freeze` turns a linear layer or a convolution into a module that holds what a file will hold
and computes what a runtime will compute: the input is quantized with a static scale, the weight is
dequantized, and the layer runs on both in floating point. That equals integer or FP4 hardware up
to the order of its additions.
Source: the Q/DQ convention of ONNX; the smoothing factors are those of SmoothQuant (Xiao et al.,
https://arxiv.org/abs/2211.10438) with the sign of modelopt's `pre_quant_scale`: the input is
multiplied by them, the weight was divided by them.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.numerics import fp8, int8, nvfp4
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

__all__ = ["FrozenConvolution", "FrozenLayer", "FrozenLinear", "freeze"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class FrozenLayer(nn.Module):
    """A layer whose weight is stored in `format`; base of the two kinds.

    Buffers, all in the `state_dict`: the stored weight (`weight_packed`, `weight_block_scale` and
    `weight_tensor_scale` for nvfp4, else `weight_quantized` and `weight_scale`), `input_scale`,
    and, where the layer has them, `bias` and `input_smoothing`, float32.

    `half()` and its kin move these buffers but do not change their types. The output has the type
    of the input.
    """

    weight_packed: torch.Tensor
    weight_block_scale: torch.Tensor
    weight_tensor_scale: torch.Tensor
    weight_quantized: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    input_smoothing: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        format: str,
        input_amax: float,
        input_smoothing: torch.Tensor | None,
        name: str,
    ) -> None:
        """Quantize `weight` `[N, ...]`; see `freeze` for the rest."""
        super().__init__()
        self.format = format
        for buffer, tensor in _stored_weight(weight, format, name).items():
            self.register_buffer(buffer, tensor)
        scale = {"nvfp4": nvfp4, "int8": int8, "fp8": fp8}[format].input_scale(input_amax)
        self.register_buffer("input_scale", scale.to(weight.device))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("input_smoothing", input_smoothing)

    @property
    def weight_bits(self) -> int:
        """All bits that the stored weight takes, scales counted."""
        return 8 * sum(
            buffer.numel() * buffer.element_size()
            for name, buffer in self.named_buffers()
            if name.startswith("weight_")
        )

    def dequantized_weight(self) -> torch.Tensor:
        """The weight that the layer computes with, float32."""
        weight: torch.Tensor
        if self.format == "nvfp4":
            weight = nvfp4.dequantize(
                self.weight_packed, self.weight_block_scale, self.weight_tensor_scale
            )
        elif self.format == "int8":
            weight = int8.dequantize(self.weight_quantized, self.weight_scale, 0)
        else:
            weight = fp8.dequantize(self.weight_quantized, self.weight_scale)
        return weight

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, smoothed already, as the format can hold it."""
        rounded: torch.Tensor
        if self.format == "nvfp4":
            rounded = nvfp4.quantize_dequantize(x, self.input_scale)
        elif self.format == "int8":
            rounded = int8.quantize_dequantize(x, self.input_scale, 0)
        else:
            rounded = fp8.quantize_dequantize(x, self.input_scale)
        return rounded

    def _operands(
        self, x: torch.Tensor, smoothing: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Input, weight and bias in the type of `x`; `smoothing` broadcasts over `x`."""
        if smoothing is not None:
            x = x * smoothing.to(x.dtype)
        weight = self.dequantized_weight().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.quantized_input(x), weight, bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device; keep the type, which is part of the format."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device=fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        """Format and sizes, for `print(module)`."""
        return f"format={self.format}, weight_bits={self.weight_bits}"


class FrozenLinear(FrozenLayer):
    """`nn.Linear` with weight and input in `format`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, in the type of `x`."""
        return functional.linear(*self._operands(x, self.input_smoothing))


class FrozenConvolution(FrozenLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with weight and input in `format`."""

    def __init__(
        self,
        layer: _Convolution,
        weight: torch.Tensor,
        format: str,
        input_amax: float,
        input_smoothing: torch.Tensor | None,
        name: str,
    ) -> None:
        """Take geometry and bias from `layer`, quantize `weight` `[N, K / groups, ...]`."""
        super().__init__(weight, layer.bias, format, input_amax, input_smoothing, name)
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.groups = layer.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, K, ...]`, or without batch `[K, ...]`, to the same with N, in the type of `x`."""
        smoothing = self.input_smoothing
        weight_axes = self.weight_quantized.ndim
        if smoothing is not None:
            smoothing = smoothing.view(-1, *[1] * (weight_axes - 2))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[weight_axes - 3]
        return convolve(
            *self._operands(x, smoothing), self.stride, self.padding, self.dilation, self.groups
        )


def _stored_weight(weight: torch.Tensor, format: str, name: str) -> dict[str, torch.Tensor]:
    if format == "nvfp4":
        packed = nvfp4.quantize_weight(weight, name=name)
        return {
            "weight_packed": packed.packed,
            "weight_block_scale": packed.block_scale,
            "weight_tensor_scale": packed.tensor_scale,
        }
    quantize = int8.quantize_weight if format == "int8" else fp8.quantize_weight
    stored = quantize(weight, name=name)
    return {"weight_quantized": stored.codes, "weight_scale": stored.scale}


def freeze(
    layer: nn.Module,
    format: str,
    input_amax: float,
    *,
    input_smoothing: torch.Tensor | None = None,
    name: str = "",
) -> nn.Module:
    """The frozen form of `layer`, which is not changed.

    Args:
        layer: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        format: a name in `spec.formats.FORMATS`.
        input_amax: largest magnitude of the input in calibration, after smoothing. Larger values
            saturate. 0, an input that was always zero, counts as 1.0.
        input_smoothing: `[K]`, positive; the input is multiplied by it and the weight divided.
        name: the layer's full name, for errors.

    Raises:
        InputError: a kind of layer, padding or shape that the format does not take; weights,
            `input_amax` or `input_smoothing` that are not finite.
    """
    kind = _kind(layer, name)
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    what = f"{name}.weight" if name else f"weight of {layer}"
    if format not in FORMATS:
        message = f"unknown format {format!r}; choose one of: {', '.join(FORMATS)}"
        raise InputError(message)
    objection = FORMATS[format].objection(kind, tuple(layer.weight.shape))
    if objection:
        message = f"{what}: {objection}; choose another format or keep the layer"
        raise InputError(message)
    weight = layer.weight.detach()
    if input_smoothing is not None:
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        input_smoothing = _checked_smoothing(input_smoothing, weight.shape[1] * groups, what)
        weight = _divide_columns(weight.float(), input_smoothing.to(weight.device), groups)
    if isinstance(layer, nn.Linear):
        return FrozenLinear(weight, layer.bias, format, input_amax, input_smoothing, what)
    return FrozenConvolution(layer, weight, format, input_amax, input_smoothing, what)


def _kind(layer: nn.Module, name: str) -> str:
    """The layer's kind, as in `spec.formats`."""
    kinds = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
    words = [word for kind, word in kinds.items() if isinstance(layer, kind)]
    if not words:
        message = (
            f"{name or 'the layer'} must be a linear layer or a convolution, got "
            f"{type(layer).__name__}; keep it as it is"
        )
        raise InputError(message)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        message = (
            f"{name or 'the layer'} must pad with zeros to be quantized, its padding_mode is "
            f"{mode!r}; keep it as it is"
        )
        raise InputError(message)
    return words[0]


def _checked_smoothing(smoothing: torch.Tensor, num_channels: int, what: str) -> torch.Tensor:
    if smoothing.shape != (num_channels,):
        message = (
            f"{what}: input_smoothing must have one factor for each of the {num_channels} input "
            f"channels, got shape {list(smoothing.shape)}"
        )
        raise InputError(message)
    smoothing = smoothing.detach().float().clone()
    if not bool((smoothing.isfinite() & (smoothing > 0)).all()):
        message = f"{what}: input_smoothing must be positive and finite; calibrate it again"
        raise InputError(message)
    return smoothing


def _divide_columns(weight: torch.Tensor, smoothing: torch.Tensor, groups: int) -> torch.Tensor:
    """Divide `weight` `[N, K / groups, ...]` by the factor `[K]` of each input channel."""
    by_group = weight.view(groups, -1, *weight.shape[1:])
    factors = smoothing.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (by_group / factors).flatten(0, 1)
