"""Triton kernel: attention whose products, QK and PV, multiply eight-bit codes.

What: the arithmetic of `compress.attention_products`, tile by tile: scores never leave the chip.
Source: the online softmax of FlashAttention-2 (Dao, https://arxiv.org/abs/2307.08691), with codes
as in SageAttention (see `attention_products`).
What differs from `attention_products`: probabilities are rounded against the largest score of their
row that was seen so far, not of the whole row, which a second pass would have to find.

Imported only where Triton is; see `compress.kernels.available`.

Shapes: R sequences and heads, L queries, S keys, D width of a head, F width of a value.
"""

import triton
import triton.language as tl

__all__ = ["attention"]


@triton.jit
def attention(
    query_pointer, key_pointer, value_pointer, out_pointer,
    query_scale_pointer, key_scale_pointer, value_scale_pointer, factor, L, S, D, F,
    FLOAT: tl.constexpr, CAUSAL: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Codes `[R, L, D]`, `[R, S, D]` and, transposed, `[R, F, S]` to `[R, L, F]`.

    FLOAT: probabilities and values are E4M3, else INT8.
    """
    sequence = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    width, value_width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    query = tl.load(
        query_pointer + (sequence * L + rows)[:, None] * D + width[None, :],
        mask=(rows < L)[:, None] & (width < D)[None, :], other=0.0,
    )  # fmt: skip
    score_scale = tl.load(query_scale_pointer) * tl.load(key_scale_pointer) * factor
    value_scale = tl.load(value_scale_pointer)
    largest = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    result = tl.zeros((BLOCK_L, BLOCK_F), tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (tl.program_id(0) + 1) * BLOCK_L)
    for start in range(0, end, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        key = tl.load(
            key_pointer + (sequence * S + columns)[:, None] * D + width[None, :],
            mask=(columns < S)[:, None] & (width < D)[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(
            value_pointer + (sequence * F + value_width)[:, None] * S + columns[None, :],
            mask=(value_width < F)[:, None] & (columns < S)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key)).to(tl.float32) * score_scale
        seen = (columns < S)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new)
        weights = tl.exp(scores - new[:, None])
        result *= shrink[:, None]
        if FLOAT:
            scaled = weights * 448.0
            if INTERPRETED:
                # Its cast cuts bits off; hardware rounds. See `triton_matmul`.
                power = scaled.to(tl.int32, bitcast=True) & 0x7F800000
                power = tl.maximum(power, 121 << 23).to(tl.float32, bitcast=True)
                scaled = (scaled + power * 1572864.0) - power * 1572864.0
            code = scaled.to(tl.float8e4nv)
            total = total * shrink + tl.sum(code.to(tl.float32), 1) / 448.0
            result += tl.dot(code, tl.trans(value)) * (value_scale / 448.0)
        else:
            total = total * shrink + tl.sum(weights, 1)
            code = (((weights - 0.5) * 254.0 + 12582912.0) - 12582912.0).to(tl.int8)
            part = tl.dot(code, tl.trans(value)).to(tl.float32) * (value_scale / 254.0)
            # The half that was taken off, times what is seen; unseen codes are taken off again.
            if CAUSAL:
                halves = tl.dot(tl.where(seen, 1, 0).to(tl.int8), tl.trans(value)).to(tl.float32)
                unseen = tl.where(seen, 0, -127).to(tl.int8)
                part -= tl.dot(unseen, tl.trans(value)).to(tl.float32) * (value_scale / 254.0)
                part += 0.5 * value_scale * halves
            else:
                part += 0.5 * value_scale * tl.sum(value.to(tl.float32), 1)[None, :]
            result += part
        largest = new
    result /= total[:, None]
    tl.store(
        out_pointer + (sequence * L + rows)[:, None] * F + value_width[None, :],
        result.to(out_pointer.dtype.element_ty),
        mask=(rows < L)[:, None] & (value_width < F)[None, :],
    )  # fmt: skip
