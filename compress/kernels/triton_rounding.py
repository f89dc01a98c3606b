"""Triton kernels: an input rounded in one pass over it.

What: the arithmetic of `compress.numerics`, to the bit: divisions are those of IEEE 754, and what
is rounded is rounded half to even by adding (see `numerics.rounding`). `round_tokens` makes the
codes and scales of INT8 and FP8, `round_blocks` the values of NVFP4, MXFP4 and MXFP8 in units of
the tensor scale, all of which bfloat16 holds exactly.

Imported only where Triton is; see `compress.kernels.available`.

Shapes: M tokens, K channels.
"""

import triton
import triton.language as tl

__all__ = ["round_blocks", "round_tokens"]


@triton.jit
def _round_mantissa(value, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """Values rounded to BITS mantissa bits; below 2^LOWEST the step no longer shrinks."""
    power = value.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(power, (LOWEST + 127) << 23).to(tl.float32, bitcast=True)
    if BITS == 3:
        step = power * 1572864.0
    else:
        step = power * 6291456.0
    return (value + step) - step


@triton.jit
def _clamp(value, LARGEST: tl.constexpr):
    """NaN stays NaN."""
    value = tl.where(value > LARGEST, LARGEST, value)
    return tl.where(value < -LARGEST, -LARGEST, value)


@triton.jit
def round_tokens(
    x_pointer, static_pointer, code_pointer, scale_pointer, K,
    FLOAT: tl.constexpr, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: `x` `[M, K]` to codes `[M, K]`, and with DYNAMIC to scales `[M]`."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    value = tl.load(x_pointer + row * K + inner, mask=inner < K, other=0.0).to(tl.float32)
    LARGEST: tl.constexpr = 448.0 if FLOAT else 127.0
    if DYNAMIC:
        value = _clamp(value, 8.507059173023462e37)
        amax = tl.max(tl.abs(value), 0)
        bad = tl.max((value != value).to(tl.int32), 0)
        exact = tl.maximum(tl.div_rn(amax, LARGEST), 7.888609052210118e-31)
        scale = tl.where(amax == 0, 1.0, exact)
        # Codes carry no NaN: the scale makes the whole token NaN.
        tl.store(scale_pointer + row, tl.where(bad > 0, float("nan"), scale))
    else:
        scale = tl.load(static_pointer)
    scaled = tl.div_rn(value, tl.zeros_like(value) + scale)
    if FLOAT:
        scaled = _round_mantissa(_clamp(scaled, 448.0), 3, -6)
        code = scaled.to(tl.float8e4nv)
    else:
        scaled = _clamp(scaled, 1048576.0)
        scaled = (scaled + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(scaled, -128.0), 127.0).to(tl.int8)
    tl.store(code_pointer + row * K + inner, code, mask=inner < K)


@triton.jit
def round_blocks(
    x_pointer, tensor_scale_pointer, out_pointer, num_blocks,
    FORMAT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`num_blocks` blocks of SIZE values, ROWS of them a program; in units of the tensor scale."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (block < num_blocks)[:, None]
    value = tl.load(x_pointer + places, mask=mask, other=0.0).to(tl.float32)
    if FORMAT != "nvfp4":
        value = _clamp(value, 8.507059173023462e37)
    bad = tl.max((value != value).to(tl.int32), 1)
    amax = tl.max(tl.where(value != value, 0.0, tl.abs(value)), 1)
    if FORMAT == "nvfp4":
        tensor_scale = tl.load(tensor_scale_pointer)
        scale = tl.div_rn(amax, tl.zeros_like(amax) + 6.0 * tensor_scale)
        scale = tl.where(scale == 0, 1.0, scale)
        scale = _round_mantissa(tl.minimum(tl.maximum(scale, 0.001953125), 448.0), 3, -6)
        divisor = scale * tensor_scale
    else:
        exact = tl.div_rn(amax, tl.zeros_like(amax) + (6.0 if FORMAT == "mxfp4" else 448.0))
        exact = tl.where(amax == 0, 1.0, tl.maximum(exact, 7.888609052210118e-31))
        # A mantissa that is not zero carries into the exponent: the next power of two.
        bits = (exact.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
        divisor = scale
    scaled = tl.div_rn(value, tl.broadcast_to(divisor[:, None], (ROWS, SIZE)))
    if FORMAT == "mxfp8":
        rounded = _round_mantissa(_clamp(scaled, 448.0), 3, -6)
    else:
        rounded = _round_mantissa(_clamp(scaled, 6.0), 1, 0)
    result = rounded * scale[:, None]
    result = tl.where(bad[:, None] > 0, float("nan"), result)
    tl.store(out_pointer + places, result.to(out_pointer.dtype.element_ty), mask=mask)
