"""Triton kernel: a product with a packed weight, unpacked on the way to the tensor cores.

What: `out = (a @ w.T) * row_scale * column_scale + bias`, with w in one of six stored forms. Four
bits become numbers in registers, block scales are applied there, and what is multiplied is exact:
E2M1 times E4M3 has six significant bits, of which bfloat16 holds eight. Where `a` is FP8 or INT8,
four-bit weights are rounded to that type against one unit an output channel (`layout.unit_of`).
Source: the layouts of `compress.kernels.layout`; E2M1 is read as the lowest bits of float16's
exponent, whose subnormals are E2M1's, and multiplied by 2^14.

Imported only where Triton is; see `compress.kernels.available`.

Shapes: M tokens, K contraction, N outputs.
"""

# Triton reads the source of these functions, in which only plain names and constants work.

import triton
import triton.language as tl

__all__ = ["CONFIGURATIONS", "matmul", "tuned_matmul"]

CONFIGURATIONS = [
    triton.Config({"BLOCK_M": rows, "BLOCK_N": columns}, num_warps=warps, num_stages=stages)
    for rows, columns, warps, stages in (
        (16, 64, 4, 4), (32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4),
        (128, 128, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3),
    )
]  # fmt: skip


@triton.jit
def _element(code):
    """float32 of E2M1 codes, int32 from 0 to 15, without their factor 2^14."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(pointer, rows, row_mask, num_groups, first, GROUP: tl.constexpr, WIDTH: tl.constexpr,
            WEIGHT: tl.constexpr):  # fmt: skip
    """float32 scales `[rows, WIDTH]` of values that start in group `first`."""
    if GROUP >= WIDTH:
        # A vector, since the interpreter's comparison of two plain numbers is no mask.
        mask = row_mask & ((first + rows * 0) < num_groups)
        raw = tl.load(pointer + rows * num_groups + first, mask=mask, other=0)[:, None]
    else:
        groups = first + tl.arange(0, WIDTH // GROUP)
        # Groups beyond the last one belong to padding, whose values are zero.
        mask = row_mask[:, None] & (groups < num_groups)[None, :]
        raw = tl.load(pointer + rows[:, None] * num_groups + groups[None, :], mask=mask, other=0)
        spread = tl.broadcast_to(raw[:, :, None], (raw.shape[0], WIDTH // GROUP, GROUP))
        raw = tl.reshape(spread, (raw.shape[0], WIDTH))
    if WEIGHT == "nvfp4":
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if WEIGHT == "int4":
        return raw.to(tl.float32)
    return (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_e4m3(value, INTERPRETED: tl.constexpr):
    """E4M3 of float32 values of magnitude at most 448, half to even."""
    if INTERPRETED:
        # The interpreter's cast cuts bits off; hardware rounds. See `compress.numerics.rounding`.
        power = value.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.maximum(power, 121 << 23).to(tl.float32, bitcast=True)
        step = power * 1572864.0
        value = (value + step) - step
    return value.to(tl.float8e4nv)


@triton.jit
def _operand(value, unit, LIKE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 weights `[N, K]` as the type that is multiplied; `unit` `[N, 1]` for 8 bits."""
    if LIKE == tl.int8:
        # Adding 1.5 * 2^23 rounds half to even.
        return (((value / unit) + 12582912.0) - 12582912.0).to(tl.int8)
    if LIKE == tl.float8e4nv:
        return _to_e4m3(value / unit, INTERPRETED)
    return value.to(LIKE)


@triton.jit
def matmul(
    a_pointer, w_pointer, scale_pointer, unit_pointer, row_pointer, column_pointer, bias_pointer,
    out_pointer, M, N, K, num_groups, row_stride, column_stride,
    WEIGHT: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, LIKE: tl.constexpr,
    HAS_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """See the module; `row_stride` and `column_stride` are 0 for one scale a tensor, else 1."""
    # Programs that follow each other share columns of few rows of blocks: their weights stay near.
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = 8 * blocks_n
    first_m = program // band * 8
    height = tl.minimum(blocks_m - first_m, 8)
    block_m = first_m + program % band % height
    block_n = program % band // height
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    a_rows = a_pointer + rows[:, None] * K
    WIDTH: tl.constexpr = 2 * HALF
    unit = 1.0
    if HAS_UNIT:
        unit = tl.load(unit_pointer + columns, mask=column_mask, other=1.0)[:, None]
    if LIKE == tl.int8:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    FOUR: tl.constexpr = WEIGHT == "nvfp4" or WEIGHT == "mxfp4" or WEIGHT == "int4"
    for start in range(0, K, WIDTH):
        if FOUR:
            inner = tl.arange(0, HALF)
            # Each row of bytes is a multiple of HALF: padding is stored.
            stored = tl.cdiv(K, WIDTH) * HALF
            packed = tl.load(
                w_pointer + columns[:, None] * stored + (start // 2 + inner)[None, :],
                mask=column_mask[:, None], other=0,
            ).to(tl.int32)  # fmt: skip
            for part in tl.static_range(2):
                offset = start + part * HALF
                code = (packed >> (4 * part)) & 15
                scale = _scales(scale_pointer, columns, column_mask, num_groups, offset // GROUP,
                                GROUP, HALF, WEIGHT)  # fmt: skip
                if WEIGHT == "int4":
                    value = ((code ^ 8) - 8).to(tl.float32) * scale
                else:
                    value = _element(code) * (scale * 16384.0)
                inside = (offset + inner) < K
                a = tl.load(a_rows + (offset + inner)[None, :],
                            mask=row_mask[:, None] & inside[None, :], other=0.0)  # fmt: skip
                if LIKE != tl.int8 and LIKE != tl.float8e4nv:
                    a = a.to(LIKE)
                w = tl.trans(_operand(value, unit, LIKE, INTERPRETED))
                if LIKE == tl.int8:
                    total += tl.dot(a, w, out_dtype=tl.int32)
                elif LIKE == tl.float32:
                    total += tl.dot(a, w, input_precision="ieee")
                else:
                    total += tl.dot(a, w)
        else:
            inner = start + tl.arange(0, WIDTH)
            inside = inner < K
            a = tl.load(a_rows + inner[None, :], mask=row_mask[:, None] & inside[None, :],
                        other=0.0)  # fmt: skip
            w = tl.load(w_pointer + columns[:, None] * K + inner[None, :],
                        mask=column_mask[:, None] & inside[None, :], other=0.0)  # fmt: skip
            if WEIGHT == "mxfp8":
                scale = _scales(scale_pointer, columns, column_mask, num_groups, start // GROUP,
                                GROUP, WIDTH, WEIGHT)  # fmt: skip
                w = (w.to(tl.float32) * scale).to(LIKE)
            if LIKE == tl.int8:
                total += tl.dot(a, tl.trans(w), out_dtype=tl.int32)
            elif LIKE == tl.float32:
                total += tl.dot(a.to(LIKE), tl.trans(w.to(LIKE)), input_precision="ieee")
            else:
                total += tl.dot(a.to(LIKE), tl.trans(w.to(LIKE)))
    row_scale = tl.load(row_pointer + rows * row_stride, mask=row_mask, other=0.0)
    column_scale = tl.load(column_pointer + columns * column_stride, mask=column_mask, other=0.0)
    if HAS_UNIT:
        column_scale *= tl.load(unit_pointer + columns, mask=column_mask, other=1.0)
    result = total.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if HAS_BIAS:
        result += tl.load(bias_pointer + columns, mask=column_mask, other=0.0)[None, :]
    tl.store(
        out_pointer + rows[:, None] * N + columns[None, :],
        result.to(out_pointer.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :],
    )  # fmt: skip


# Its choice is made once for each size, before a CUDA graph is captured.
tuned_matmul = triton.autotune(
    configs=CONFIGURATIONS, key=["M", "N", "K", "WEIGHT", "LIKE", "HAS_UNIT"]
)(matmul)
