"""What torch sees of the kernels: operators on packed weights, and inputs rounded for them.

What: each operator runs a Triton kernel (see `available`), or, on a CPU without Triton's
interpreter, the same integers and floats in torch. Shapes alone decide which, never data, so that
torch.compile and CUDA graphs work over them. While torch.compile traces, inputs are rounded to
INT8 and FP8 in torch, so that the compiler fuses that with what made the input.

Shapes: M tokens, K contraction, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from vcompress.compress.kernels.available import interpreted, runs_triton
from vcompress.compress.kernels.layout import PackedWeight, half_chunk, unscaled
from vcompress.compress.numerics import fp8, int8, mxfp4, mxfp8, nvfp4, operands

__all__ = ["block_rounded", "packed_matmul", "rounded_tokens", "scaled_matmul"]

_BLOCKS = {"nvfp4": nvfp4.BLOCK_SIZE, "mxfp4": mxfp4.BLOCK_SIZE, "mxfp8": mxfp8.BLOCK_SIZE}
_LARGEST = {torch.int8: int8.LARGEST_CODE, torch.float8_e4m3fn: fp8.LARGEST_CODE}
# What a token may have at most for one program to hold it.
_LONGEST_TOKEN = 2**16
_INTERPRETED_TILES = {"BLOCK_M": 16, "BLOCK_N": 32}


def rounded_tokens(
    x: torch.Tensor, code_type: torch.dtype, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[M, K]` of `x` `[M, K]`, and float32 scales: `[1]` if static, else `[M]`.

    Args:
        x: contiguous.
        code_type: int8 or float8_e4m3fn.
        static_scale: 0-dim float32, or None for the scale that each token asks for itself.
    """
    if torch.compiler.is_compiling() or not runs_triton(x.device) or x.shape[1] > _LONGEST_TOKEN:
        return _rounded_in_torch(x, code_type, static_scale)
    codes, scale = _round_tokens(x, code_type == torch.int8, static_scale)
    return codes, scale if static_scale is None else static_scale.reshape(1)


def _rounded_in_torch(
    x: torch.Tensor, code_type: torch.dtype, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values, largest = x.float(), _LARGEST[code_type]
    if static_scale is None:
        values = values.clamp(-operands.LARGEST_VALUE, operands.LARGEST_VALUE)
        scale = operands.weight_scale(values.abs().amax(-1), largest)
        scaled = values / scale[:, None]
    else:
        scale = static_scale.reshape(1)
        scaled = values / scale
    if code_type == torch.int8:
        return scaled.round().clamp(-128, 127).to(torch.int8), scale
    return scaled.clamp(-largest, largest).to(code_type), scale


@torch.library.custom_op("vcompress::round_tokens", mutates_args=())
def _round_tokens(
    x: torch.Tensor, integers: bool, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from vcompress.compress.kernels import triton_rounding

    code_type = torch.int8 if integers else torch.float8_e4m3fn
    codes = torch.empty_like(x, dtype=code_type)
    scale = x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        triton_rounding.round_tokens[(len(x),)](
            x, scale if static_scale is None else static_scale, codes, scale, x.shape[1],
            FLOAT=not integers, DYNAMIC=static_scale is None, BLOCK=_power_of_two(x.shape[1]),
            num_warps=4 if x.shape[1] <= 4096 else 8,
        )  # fmt: skip
    return codes, scale


@_round_tokens.register_fake
def _(
    x: torch.Tensor, integers: bool, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    code_type = torch.int8 if integers else torch.float8_e4m3fn
    return torch.empty_like(x, dtype=code_type), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("vcompress::block_rounded", mutates_args=())
def block_rounded(x: torch.Tensor, tensor_scale: torch.Tensor | None, kind: str) -> torch.Tensor:
    """bfloat16 `[M, K]`: `x` as "nvfp4", "mxfp4" or "mxfp8" holds it, over the tensor scale.

    Args:
        x: contiguous, K made of whole blocks.
        tensor_scale: 0-dim float32 for nvfp4, else None.
        kind: the format.
    """
    if not runs_triton(x.device):
        if kind == "nvfp4":
            assert tensor_scale is not None
            # Six bits of a quotient that was rounded once are what they were.
            rounded: torch.Tensor = nvfp4.quantize_dequantize(x.float(), tensor_scale)
            return rounded.div_(tensor_scale).bfloat16()
        operator = mxfp4.quantize_dequantize if kind == "mxfp4" else mxfp8.quantize_dequantize
        rounded = operator(x.float())
        return rounded.bfloat16()
    from vcompress.compress.kernels import triton_rounding

    result = torch.empty_like(x, dtype=torch.bfloat16)
    size, rows = _BLOCKS[kind], 64
    num_blocks = x.numel() // size
    if num_blocks:
        triton_rounding.round_blocks[(-(-num_blocks // rows),)](
            x, x if tensor_scale is None else tensor_scale, result, num_blocks,
            FORMAT=kind, SIZE=size, ROWS=rows,
        )  # fmt: skip
    return result


@block_rounded.register_fake
def _(x: torch.Tensor, tensor_scale: torch.Tensor | None, kind: str) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.bfloat16)


@torch.library.custom_op("vcompress::packed_matmul", mutates_args=())
def packed_matmul(
    a: torch.Tensor, row_scale: torch.Tensor, codes: torch.Tensor, group_scale: torch.Tensor,
    scale: torch.Tensor, unit: torch.Tensor | None, bias: torch.Tensor | None, kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """`[M, N]`: `(a @ w.T) * row_scale * scale + bias` with the weight of a `PackedWeight`.

    Args:
        a: contiguous `[M, K]`: int8, float8_e4m3fn, or floats, whose type is what is multiplied.
        row_scale: float32 `[1]` or `[M]`.
        codes: of the weight, as are `group_scale`, `scale` and `kind`.
        unit: float32 `[N]` where four-bit weights meet eight-bit inputs, see `layout.unit_of`.
        bias: float32 `[N]`.
        out_dtype: of the result.
    """
    weight = PackedWeight(kind=kind, codes=codes, group_scale=group_scale, scale=scale)
    if not runs_triton(a.device):
        return _in_torch(a, row_scale, weight, unit, bias).to(out_dtype)
    return _in_triton(a, row_scale, weight, unit, bias, out_dtype)


@packed_matmul.register_fake
def _(
    a: torch.Tensor, row_scale: torch.Tensor, codes: torch.Tensor, group_scale: torch.Tensor,
    scale: torch.Tensor, unit: torch.Tensor | None, bias: torch.Tensor | None, kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], codes.shape[0]), dtype=out_dtype)


def _in_torch(
    a: torch.Tensor, row_scale: torch.Tensor, weight: PackedWeight, unit: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same product on a CPU: integers stay integers, everything else is float32."""
    if weight.group_scale.numel():
        values = unscaled(weight, a.shape[1])
        if unit is not None:
            values = values / unit[:, None]
            values = values.round() if a.dtype == torch.int8 else values.to(a.dtype).float()
    else:
        values = weight.codes
    if a.dtype == torch.int8:
        total = torch._int_mm(a, values.to(torch.int8).T).float()
    else:
        # Rounded weights are multiplied in the type of the input, as in the kernel.
        like = torch.float32 if a.itemsize == 1 else a.dtype
        total = a.float() @ values.float().to(like).float().T
    total = total * row_scale[:, None] * (weight.scale if unit is None else weight.scale * unit)
    return total if bias is None else total + bias


def _in_triton(
    a: torch.Tensor, row_scale: torch.Tensor, weight: PackedWeight, unit: torch.Tensor | None,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    import triton
    from triton import language

    from vcompress.compress.kernels import triton_matmul

    m, k = a.shape
    n = len(weight.codes)
    # The interpreter cuts off what bfloat16 has no bits for; torch rounds.
    out = a.new_empty((m, n), dtype=torch.float32 if interpreted() else out_dtype)
    if m == 0:
        return out.to(out_dtype)
    likes = {
        torch.int8: language.int8, torch.float8_e4m3fn: language.float8e4nv,
        torch.bfloat16: language.bfloat16, torch.float16: language.float16,
        torch.float32: language.float32,
    }  # fmt: skip
    like = likes[a.dtype]
    if interpreted() and like == language.bfloat16:
        # Its products of bfloat16 are wrong; in float32 they are what tensor cores make of them.
        like = language.float32
    groups = weight.group_scale.shape[1] if weight.group_scale.numel() else 1
    arguments: dict[str, Any] = {
        "WEIGHT": weight.kind, "GROUP": k // groups, "HALF": half_chunk(k), "LIKE": like,
        "HAS_UNIT": unit is not None, "HAS_BIAS": bias is not None, "INTERPRETED": interpreted(),
    }  # fmt: skip
    pointers = (
        a, weight.codes, weight.group_scale, _pointer(unit, weight), row_scale, weight.scale,
        _pointer(bias, weight), out,
    )  # fmt: skip
    sizes = (m, n, k, groups, int(row_scale.numel() > 1), int(weight.scale.numel() > 1))

    def grid(tiles: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]),)

    if interpreted():
        triton_matmul.matmul[grid](*pointers, *sizes, **arguments, **_INTERPRETED_TILES)
    else:
        triton_matmul.tuned_matmul[grid](*pointers, *sizes, **arguments)
    return out.to(out_dtype)


def _pointer(tensor: torch.Tensor | None, weight: PackedWeight) -> torch.Tensor:
    """A pointer that is not read needs a tensor all the same."""
    return weight.scale if tensor is None else tensor


def scaled_matmul(
    a: torch.Tensor, row_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor | None:  # fmt: skip
    """The FP8 product of `torch._scaled_mm`, or None for what it does not take.

    It wants sizes divisible by 16 and, with a scale a row, a result in bfloat16. `a` is
    float8_e4m3fn `[M, K]`, the rest as in `packed_matmul`.
    """
    n, k = weight.codes.shape
    by_row = row_scale.numel() > 1 or weight.scale.numel() > 1
    if n % 16 or k % 16 or a.dtype != torch.float8_e4m3fn:
        return None
    if by_row and out_dtype != torch.bfloat16 and a.is_cuda:
        return None
    if by_row:
        scale_a = row_scale.expand(len(a)).reshape(-1, 1).contiguous()
        scale_b = weight.scale.expand(n).reshape(1, -1).contiguous()
    else:
        scale_a, scale_b = row_scale.reshape(()), weight.scale.reshape(())
    # Its fast accumulation keeps 14 bits.
    product = torch._scaled_mm(
        a, weight.codes.T, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype,
        use_fast_accum=False,
    )  # fmt: skip
    return product if bias is None else product + bias.to(out_dtype)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
