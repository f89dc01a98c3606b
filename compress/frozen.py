"""Frozen layers: packed weights and scales as buffers, quantization as exportable operators.

What: `freeze` turns a linear layer or a convolution into a module that holds what a file will hold
and computes what a runtime will compute: the input is rounded as its format says, the weight is
dequantized, and the layer runs on both in floating point. That equals integer or FP4 hardware up
to the order of its additions. With everything that a linear layer can have:

    x = x * input_smoothing
    branch = (x @ low_rank_down.T) @ low_rank_up.T
    y = linear(round(rotate(x)), weight) + bias + branch

where `weight` was rounded from rotate(W / input_smoothing - low_rank_up @ low_rank_down).
Source: the Q/DQ convention of ONNX; the smoothing factors are those of SmoothQuant (Xiao et al.,
https://arxiv.org/abs/2211.10438) with the sign of modelopt's `pre_quant_scale`; the branch is that
of SVDQuant (Li et al., https://arxiv.org/abs/2411.05007); for the rotation see `numerics.hadamard`.

Shapes: N output channels, K input channels, R rank, B size of a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.numerics import hadamard
from vcompress.compress.prepare import Convolution, Prepared, checked_layer, prepare
from vcompress.compress.stored import CODECS
from vcompress.compress.tensors import WEIGHT_PREFIX, LayerTensors
from vcompress.spec.formats import FLOAT

__all__ = ["FrozenConvolution", "FrozenLayer", "FrozenLinear", "freeze"]

_NO_TENSORS: LayerTensors = MappingProxyType({})
_EXTRAS = ("input_smoothing", "low_rank_down", "low_rank_up")


class FrozenLayer(nn.Module):
    """A layer whose weight is stored in `format`; base of the two kinds.

    Buffers, all in the `state_dict`: the stored weight, by the names in `stored`, and, where the
    layer has them, `input_scale`, `input_smoothing`, `low_rank_down` `[R, K]`, `low_rank_up`
    `[N, R]` and `bias`, float32. Not in the `state_dict`: `rotation` `[B, B]`, a constant.

    `half()` and its kin move these buffers but do not change their types. The output has the type
    of the input.

    Models ask their layers for a type, to bring an input to it: of the weight, or of any parameter.
    `type_marker` answers, a parameter without elements that follows `half()`.

    Attributes:
        is_simulated: whether a call rounds its input as `input_format` says, and computes in
            floats; layers of `compress.kernels` do neither.
        format: of the stored weight.
        input_format: of the input, as a rule the same; see `compress.dynamic`, which changes it
            from step to step to one that takes its scales from the input, or to keep.
    """

    is_simulated: ClassVar[bool] = True

    input_scale: torch.Tensor | None
    input_smoothing: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    rotation: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, prepared: Prepared, format: str) -> None:
        """Hold `prepared`, which is for `format`; see `freeze`."""
        super().__init__()
        self.format = self.input_format = format
        for buffer, tensor in prepared.weight.items():
            self.register_buffer(buffer, tensor)
        down, up = prepared.low_rank or (None, None)
        self.register_buffer("input_scale", prepared.input_scale)
        self.register_buffer("bias", prepared.bias)
        self.register_buffer("input_smoothing", prepared.input_smoothing)
        self.register_buffer("low_rank_down", down)
        self.register_buffer("low_rank_up", up)
        self.register_buffer("rotation", prepared.rotation, persistent=False)
        device = next(iter(prepared.weight.values())).device
        self.type_marker = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    @property
    def stored_weight(self) -> dict[str, torch.Tensor]:
        """The buffers of the stored weight, by name."""
        return {
            name: buffer for name, buffer in self.named_buffers() if name.startswith(WEIGHT_PREFIX)
        }

    @property
    def weight_bits(self) -> int:
        """All bits that the stored weight takes, scales counted."""
        return _bits(self.stored_weight.values())

    @property
    def extra_bits(self) -> int:
        """All bits of the smoothing factors and of the low-rank branch."""
        return _bits(buffer for name, buffer in self.named_buffers() if name in _EXTRAS)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight that the layer computes with, float32."""
        return CODECS[self.format].dequantize(self.stored_weight)

    @property
    def weight(self) -> torch.Tensor:
        """As the layer had it before; many models ask for its type before they call the layer."""
        return self.dequantized_weight().to(self.type_marker.dtype)

    def quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, smoothed and rotated already, as `input_format` can hold it."""
        if self.input_format == FLOAT:
            return x
        return CODECS[self.input_format].round_input(x, self.input_scale)

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rounded input, weight and bias in the type of `x`."""
        weight = self.dequantized_weight().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.quantized_input(x), weight, bias

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device; keep the type, which is part of the format."""
        self.type_marker = nn.Parameter(fn(self.type_marker.detach()), requires_grad=False)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device=fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        """Format and sizes, for `print(module)`."""
        size = None if self.rotation is None else self.rotation.shape[0]
        rotation = "" if size is None else f", rotation={size}"
        rank = "" if self.low_rank_down is None else f", rank={self.low_rank_down.shape[0]}"
        return f"format={self.format}, weight_bits={self.weight_bits}{rotation}{rank}"


class FrozenLinear(FrozenLayer):
    """`nn.Linear` with weight and input in `format`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, in the type of `input`."""
        x = input  # called as in `nn.Linear`, as some models name it
        if self.input_smoothing is not None:
            x = x * self.input_smoothing.to(x.dtype)
        branch = None
        if self.low_rank_down is not None and self.low_rank_up is not None:
            reduced = functional.linear(x, self.low_rank_down.to(x.dtype))
            branch = functional.linear(reduced, self.low_rank_up.to(x.dtype))
        if self.rotation is not None:
            x = hadamard.rotate_by(x, self.rotation)
        y = self._product(x)
        return y if branch is None else y + branch

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, smoothed and rotated already, times the weight, with bias."""
        return functional.linear(*self._operands(x))


class FrozenConvolution(FrozenLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with weight and input in `format`."""

    def __init__(self, layer: Convolution, prepared: Prepared, format: str) -> None:
        """Take the geometry from `layer`."""
        super().__init__(prepared, format)
        self.num_axes = layer.weight.ndim - 2
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.groups = layer.groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[B, K, ...]`, or without batch `[K, ...]`, to the same with N, in the input's type."""
        x = input
        if self.input_smoothing is not None:
            x = x * self.input_smoothing.to(x.dtype).view(-1, *[1] * self.num_axes)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.num_axes - 1]
        return convolve(*self._operands(x), self.stride, self.padding, self.dilation, self.groups)


def freeze(
    layer: nn.Module,
    format: str,
    input_amax: float | None,
    *,
    rotation: int | None = None,
    tensors: LayerTensors = _NO_TENSORS,
    name: str = "",
) -> nn.Module:
    """The frozen form of `layer`, which is not changed.

    Args:
        layer: `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        format: a name in `spec.formats.FORMATS`.
        input_amax: largest magnitude of the input in calibration, after smoothing and rotation.
            Larger values saturate. 0, an input that was always zero, counts as 1.0. Not used by
            formats without a static input scale; None will do there.
        rotation: block size of the Hadamard rotation of the input of a linear layer, a power of
            two that divides K; larger blocks spread outliers further and cost more time.
        tensors: calibrated tensors by part (see `compress.tensors`); a stored weight among them is
            taken as it is.
        name: the layer's full name, for errors.

    Raises:
        InputError: a kind of layer, padding or shape that the format does not take; weights,
            `input_amax` or tensors that are not finite; a rotation or tensors that do not fit.
    """
    checked = checked_layer(layer, format, name)
    what = f"{name}.weight" if name else f"weight of {layer}"
    prepared = prepare(checked, format, input_amax, rotation, tensors, what)
    if isinstance(checked, nn.Linear):
        return FrozenLinear(prepared, format)
    return FrozenConvolution(checked, prepared, format)


def _bits(tensors: Iterable[torch.Tensor]) -> int:
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
