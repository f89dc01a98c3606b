"""Number formats: what a value costs and which layers can take it.

Effective bits count every stored bit of a quantized tensor, scales included, over its values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FLOAT", "FORMATS", "Format", "LayerKind"]

LayerKind = str  # "linear", "conv1d", "conv2d" or "conv3d"
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format for the weight and the input of a layer.

    Attributes:
        name: as it stands in plans.
        element_bits: bits of one weight element.
        block_size: values that share one scale along the contraction axis; 0 for one scale an
            output channel; -1 for one scale a tensor.
        scale_bits: bits of one block or channel scale.
        tensor_scale_bits: bits of the scale of the whole tensor, if there is one.
        input_bits: bits of one value of the layer's input, block scales included; a scale for a
            whole token or tensor is too little to count. 0 where the input stays as it is.
        needs_input_amax: whether the input has a static scale, which calibration must find.
        layer_kinds: the kinds of layer that hardware runs in this format.
        description: one line for people.
    """

    name: str
    element_bits: int
    block_size: int
    scale_bits: int
    tensor_scale_bits: int
    input_bits: float
    needs_input_amax: bool
    layer_kinds: tuple[LayerKind, ...]
    description: str

    def weight_bits(self, weight_shape: tuple[int, ...]) -> int:
        """Bits that a weight of `weight_shape` (output channels first) takes, scales counted."""
        count = math.prod(weight_shape)
        if self.block_size > 0:
            num_scales = weight_shape[0] * math.ceil(count / weight_shape[0] / self.block_size)
        else:
            num_scales = weight_shape[0] if self.block_size == 0 else 0
        return count * self.element_bits + num_scales * self.scale_bits + self.tensor_scale_bits

    def objection(self, kind: LayerKind, weight_shape: tuple[int, ...]) -> str | None:
        """Why a layer cannot take this format, or None if it can.

        `weight_shape` has the output channels first; the contraction runs over the rest.
        """
        if kind not in self.layer_kinds:
            return f"{self.name} is defined for {', '.join(self.layer_kinds)} layers, not {kind}"
        contraction = math.prod(weight_shape[1:])
        if self.block_size > 0 and contraction % self.block_size:
            return (
                f"{self.name} needs a contraction size divisible by {self.block_size}, "
                f"got {contraction}"
            )
        return None


def _int4(group_size: int) -> Format:
    return Format(
        name=f"int4_g{group_size}", element_bits=4, block_size=group_size, scale_bits=16,
        tensor_scale_bits=0, input_bits=0, needs_input_amax=False, layer_kinds=("linear",),
        description=f"symmetric INT4 weights, FP16 scale per {group_size} values; input as it is",
    )  # fmt: skip


FORMATS: dict[str, Format] = {
    "nvfp4": Format(
        name="nvfp4", element_bits=4, block_size=16, scale_bits=8, tensor_scale_bits=32,
        input_bits=4.5, needs_input_amax=True, layer_kinds=("linear",),
        description="E2M1 elements, E4M3 scale per 16 values, FP32 scale per tensor; W4A4",
    ),
    "mxfp4": Format(
        name="mxfp4", element_bits=4, block_size=32, scale_bits=8, tensor_scale_bits=0,
        input_bits=4.25, needs_input_amax=False, layer_kinds=("linear",),
        description="E2M1 elements, E8M0 scale per 32 values, all dynamic; W4A4",
    ),
    "mxfp8": Format(
        name="mxfp8", element_bits=8, block_size=32, scale_bits=8, tensor_scale_bits=0,
        input_bits=8.25, needs_input_amax=False, layer_kinds=("linear",),
        description="E4M3 elements, E8M0 scale per 32 values, all dynamic; W8A8",
    ),
    "fp8": Format(
        name="fp8", element_bits=8, block_size=-1, scale_bits=0, tensor_scale_bits=32,
        input_bits=8, needs_input_amax=True, layer_kinds=("linear", *_CONVOLUTIONS),
        description="E4M3, one scale per tensor for weight and input; W8A8",
    ),
    "fp8_channel": Format(
        name="fp8_channel", element_bits=8, block_size=0, scale_bits=32, tensor_scale_bits=0,
        input_bits=8, needs_input_amax=False, layer_kinds=("linear",),
        description="E4M3, weight scale per output channel, input scale per token, dynamic; W8A8",
    ),
    "int8": Format(
        name="int8", element_bits=8, block_size=0, scale_bits=32, tensor_scale_bits=0,
        input_bits=8, needs_input_amax=True, layer_kinds=("linear", *_CONVOLUTIONS),
        description="symmetric INT8, weight scale per output channel, static input scale; W8A8",
    ),
    "int8_token": Format(
        name="int8_token", element_bits=8, block_size=0, scale_bits=32, tensor_scale_bits=0,
        input_bits=8, needs_input_amax=False, layer_kinds=("linear",),
        description="symmetric INT8, weight scale per output channel, input scale per token; W8A8",
    ),
    "int4_g128": _int4(128),
    "int4_g64": _int4(64),
    "int4_g32": _int4(32),
}  # fmt: skip

# The layer is left as it is. Counted at the bits that its parameters have in the exported graph.
FLOAT = "keep"
