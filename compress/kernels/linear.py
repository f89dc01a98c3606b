"""Linear layers that run packed weights: what `compress.frozen` simulates, executed.

What: the input is rounded to codes, codes are multiplied, and scales are applied to the product.
That is the sum that the simulated layer makes, added in another order. What is multiplied:

| format | input | product |
|---|---|---|
| int8, int8_token | INT8 codes | INT8 in 32-bit integers, exact |
| fp8, fp8_channel | E4M3 codes | `torch._scaled_mm`, or the Triton kernel for what it refuses |
| nvfp4, mxfp4, mxfp8 | as the plan rounds it | bfloat16, which holds all of both exactly |
| int4_g... | as it is | in the type of the input |

Four-bit weights take other inputs as well (`FOUR_BIT_INPUTS`), which is no longer the plan: "float"
leaves the input as it is, which is more exact and saves the rounding; "fp8" and "int8" round each
token with a scale of its own, and the weight against one unit an output channel. These run at the
rate of eight-bit tensor cores and lose what that second rounding of the weight loses.

Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch

from vcompress.compress.frozen import FrozenLinear
from vcompress.compress.kernels.available import runs_triton
from vcompress.compress.kernels.layout import PackedWeight, pack, stored, unit_of
from vcompress.compress.kernels.operators import (
    block_rounded,
    packed_matmul,
    rounded_tokens,
    scaled_matmul,
)
from vcompress.compress.numerics import fp8, int8
from vcompress.compress.prepare import Prepared
from vcompress.compress.stored import CODECS

__all__ = ["FOUR_BIT_INPUTS", "ExecutableLinear", "FourBitInputs"]

FourBitInputs = Literal["plan", "float", "fp8", "int8"]
FOUR_BIT_INPUTS: tuple[FourBitInputs, ...] = get_args(FourBitInputs)
_CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": int8.LARGEST_CODE, "fp8": fp8.LARGEST_CODE}


class ExecutableLinear(FrozenLinear):
    """`FrozenLinear` on real kernels.

    Buffers: `weight_codes`, `weight_group_scale` and `weight_scale` of a `PackedWeight`, and
    `weight_unit` `[N]` for four-bit weights with eight-bit inputs; else as in `FrozenLinear`.
    """

    is_simulated: ClassVar[bool] = False

    weight_codes: torch.Tensor
    weight_group_scale: torch.Tensor
    weight_scale: torch.Tensor
    weight_unit: torch.Tensor | None
    one: torch.Tensor

    def __init__(self, layer: FrozenLinear, four_bit_inputs: FourBitInputs = "plan") -> None:
        """Take everything from `layer`, which is not changed, and lay its weight out anew."""
        weight = pack(layer.stored_weight, layer.format)
        down, up = layer.low_rank_down, layer.low_rank_up
        prepared = Prepared(
            weight={
                "weight_codes": weight.codes, "weight_group_scale": weight.group_scale,
                "weight_scale": weight.scale,
            },
            input_scale=layer.input_scale, input_smoothing=layer.input_smoothing,
            low_rank=None if down is None or up is None else (down, up),
            rotation=layer.rotation, bias=layer.bias,
        )  # fmt: skip
        super().__init__(prepared, layer.format)
        self.type_marker = layer.type_marker
        self.training = layer.training
        self.kind = weight.kind
        self.out_features, self.in_features = (
            CODECS[layer.format]
            .dequantize({name: buffer.to("meta") for name, buffer in layer.stored_weight.items()})
            .shape
        )
        four_bits = self.kind in {"nvfp4", "mxfp4", "int4"}
        # How the input is rounded, by the arithmetic of `numerics`; "float" leaves it.
        self.inputs = self.kind
        if four_bits and four_bit_inputs != "plan":
            self.inputs = four_bit_inputs
        elif self.kind == "int4":
            self.inputs = "float"
        unit = None
        if four_bits and self.inputs in _CODE_TYPES:
            unit = unit_of(weight, self.in_features, _LARGEST[self.inputs])
        self.register_buffer("weight_unit", unit)
        self.register_buffer("one", torch.ones(1, device=weight.codes.device), persistent=False)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight as the kernels take it."""
        return PackedWeight(
            kind=self.kind, codes=self.weight_codes, group_scale=self.weight_group_scale,
            scale=self.weight_scale,
        )  # fmt: skip

    @property
    def kernel(self) -> str:
        """What runs for this layer where it is now, for people."""
        device = self.weight_codes.device
        where = "Triton" if runs_triton(device) else "torch"
        names = {"int8": "int8", "fp8": "fp8", "float": "input as it is"}
        inputs = names.get(self.inputs, f"{self.inputs} in bfloat16")
        if self.kind == "fp8" and not (self.out_features % 16 or self.in_features % 16):
            return "fp8 x fp8, torch._scaled_mm"
        weight = self.format if self.weight_group_scale.numel() else self.kind
        return f"{weight} x {inputs}, {where}"

    def dequantized_weight(self) -> torch.Tensor:
        """The weight as it is stored, float32."""
        return CODECS[self.format].dequantize(stored(self.packed_weight, self.in_features))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]` with bias, on a kernel."""
        tokens = x.reshape(-1, self.in_features).contiguous()
        return self._matrix_product(tokens).view(*x.shape[:-1], self.out_features)

    def _matrix_product(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[M, K]` to `[M, N]` with bias."""
        weight, out_dtype = self.packed_weight, tokens.dtype
        row_scale = self.one
        if self.inputs in _CODE_TYPES:
            # An input that the plan does not round so has no range: its tokens find their own.
            static = self.input_scale if self.inputs == self.kind else None
            a, row_scale = rounded_tokens(tokens, _CODE_TYPES[self.inputs], static)
        elif self.inputs == "float":
            a = tokens
        else:
            a = block_rounded(tokens, self.input_scale, self.kind)
            if self.input_scale is not None:
                row_scale = self.input_scale.reshape(1)
        if self.kind == "fp8":
            done = scaled_matmul(a, row_scale, weight, self.bias, out_dtype)
            if done is not None:
                return done
        product: torch.Tensor = packed_matmul(
            a, row_scale, weight.codes, weight.group_scale, weight.scale, self.weight_unit,
            self.bias, self.kind, out_dtype,
        )  # fmt: skip
        return product

    def extra_repr(self) -> str:
        """Also the kernel."""
        return f"{super().extra_repr()}, kernel={self.kernel}"
