"""Attention forward: one tile of rows against its sequence's keys with an online softmax, and the split-KV merge.

Dao et al., FlashAttention (2022); for few queries and many keys the keys are cut into chunks that run side by side
and are merged in key order (Flash-Decoding), so the result does not depend on which finishes first.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fastxattn.ops.attention.triton.common import (
    adjust_scores,
    chained,
    chunk_of,
    dot_seen,
    find_places,
    find_rows,
    find_tile,
    keep_mask,
    load_rows,
    log_sum_exp,
    narrow,
    power,
    span_of_keys,
    unit_of,
)  # fmt: skip


@triton.jit
def forward_step(
    b_acc, b_max, b_sum, b_q, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range,
    b_start, b_end, start_k, length_k, rows_k, batch, o_row, o_pos, o_head, m_row,
    stride_k, stride_v, stride_key_bias, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running output, maximum and sum."""
    UNIT: tl.constexpr = unit_of(b_q.dtype)
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = o_n < length_k
    o_row_k = find_rows(p_index_k, start_k + o_n, rows_k, m_n)
    b_k = load_rows(p_k, o_row_k, stride_k, m_n, MASKED, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(p_v, o_row_k, stride_v, m_n, MASKED, VALUE_DIM, BLOCK_DV)
    m_seen = m_row[:, None] & m_n[None, :]
    b_s = chained(b_q, b_k, 4 if b_q.dtype == tl.float32 else 1, PRECISION)  # [BLOCK_M, BLOCK_N]
    o_pos_k = find_places(p_bias, o_row_k, start_k, rows_k, batch)
    b_s, _tanh = adjust_scores(
        b_s, p_key_bias, p_bias, o_row[:, None], o_row_k[None, :], o_pos[:, None], o_pos_k[None, :],
        o_head[:, None], m_seen, stride_key_bias, stride_bias_q, stride_bias_k, stride_bias_h, scale, softcap,
        UNIT, SOFTCAP, KEY_BIAS_HEADS,
    )  # fmt: skip
    if p_range is not None:
        m_seen = (o_n[None, :] >= b_start[:, None]) & (o_n[None, :] < b_end[:, None])
    if MASKED:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = power(b_s - b_base[:, None], UNIT)
    b_alpha = power(b_max - b_base, UNIT)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    if p_seed is not None:
        b_p = tl.where(keep_mask(p_seed, o_row, i_first, o_head, dropout_p, BLOCK_N), b_p, 0.0)
    b_acc = dot_seen(b_p, b_v, b_acc * b_alpha[:, None], m_seen, p_range is not None, PRECISION)
    return b_acc, b_new_max, b_sum


@triton.jit
def attention_forward(
    p_q, p_k, p_v, p_out, p_lse, p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, p_index_k, p_range, p_key_bias,
    p_bias, p_seed, rows_q, rows_k, slots_q, slots_k, batch, kv_heads, stride_qr, stride_qh, stride_kr, stride_kh,
    stride_vr, stride_vh, stride_key_bias, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    scale, softcap, dropout_p,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of rows, key/value head, chunk of keys). Outputs are (SPLITS, rows, heads, ...) contiguous.

    lse is float64 for float32 inputs: rounded, it would scale a whole row of whatever is made from it.
    """
    nothing, i_b, i_kv, i_split, chunk, start_q, start_k, length_k, m_m, o_head, o_row = find_tile(
        p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k, batch, kv_heads, GROUP, BLOCK_M,
        BLOCK_N, SPLITS, SPLIT_KEYS,
    )  # fmt: skip
    if nothing:
        return
    o_pos = find_places(p_bias, o_row, start_q, rows_q, batch)
    p_q_rows = p_q + o_head.to(tl.int64)[:, None] * stride_qh
    b_q = load_rows(p_q_rows, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    i_low, i_high, b_start, b_end = span_of_keys(p_range, o_row, m_m, length_k, chunk, i_split, SPLITS, BLOCK_N)
    i_full = i_low
    # Whole blocks need no mask; in float32, where it costs nothing beside the products, a second loop costs registers.
    WHOLE: tl.constexpr = (p_range is None) and (p_q.dtype.element_ty != tl.float32)
    if WHOLE:
        i_full = i_low + (i_high - i_low) // BLOCK_N * BLOCK_N
    if p_bias is not None:
        p_bias += i_b.to(tl.int64) * stride_bias_b

    p_k += i_kv.to(tl.int64) * stride_kh
    p_v += i_kv.to(tl.int64) * stride_vh
    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        for i_first in range(i_low, i_full, BLOCK_N):
            b_acc, b_max, b_sum = forward_step(
                b_acc, b_max, b_sum, b_q, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range,
                b_start, b_end, start_k, length_k, rows_k, batch, o_row, o_pos, o_head, m_m,
                stride_kr, stride_vr, stride_key_bias, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap,
                dropout_p, False, SOFTCAP, KEY_BIAS_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
            )  # fmt: skip
    for i_first in range(i_full, i_high, BLOCK_N):
        b_acc, b_max, b_sum = forward_step(
            b_acc, b_max, b_sum, b_q, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range,
            b_start, b_end, start_k, length_k, rows_k, batch, o_row, o_pos, o_head, m_m,
            stride_kr, stride_vr, stride_key_bias, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap,
            dropout_p, True, SOFTCAP, KEY_BIAS_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip

    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = log_sum_exp(b_max / unit_of(p_q.dtype.element_ty), b_sum, p_lse.dtype.element_ty)
    if p_seed is not None:
        b_norm *= 1.0 - dropout_p
    b_out = b_acc / b_norm[:, None]
    heads = kv_heads * GROUP
    i_plane = i_split.to(tl.int64)
    tl.store(p_lse + (i_plane * heads + o_head) * rows_q + o_row, b_lse, mask=m_m)
    o_dv = tl.arange(0, BLOCK_DV)
    p_out_rows = p_out + ((i_plane * rows_q + o_row) * heads + o_head)[:, None] * VALUE_DIM + o_dv[None, :]
    tl.store(p_out_rows, narrow(b_out, p_out.dtype.element_ty), mask=m_m[:, None] & (o_dv < VALUE_DIM)[None, :])


@triton.jit
def attention_merge(
    p_part, p_part_lse, p_out, p_lse, p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k,
    batch, kv_heads, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """The chunks of every row, in key order; part is (SPLITS, rows, heads, VALUE_DIM) float32, lse as in forward."""
    nothing, _b, _kv, _split, _chunk, _q, _k, length_k, m_m, o_head, o_row = find_tile(
        p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k, batch, kv_heads, GROUP, BLOCK_M,
        BLOCK_N, 1, SPLIT_KEYS,
    )  # fmt: skip
    if nothing:
        return
    o_dv = tl.arange(0, BLOCK_DV)
    m_out = m_m[:, None] & (o_dv < VALUE_DIM)[None, :]
    heads = kv_heads * GROUP
    o_out = (o_row.to(tl.int64) * heads + o_head)[:, None] * VALUE_DIM + o_dv[None, :]

    b_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), p_part_lse.dtype.element_ty)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_split in range(0, tl.maximum(tl.cdiv(length_k, chunk_of(length_k, SPLITS, SPLIT_KEYS, BLOCK_N)), 1)):
        i_plane = tl.cast(i_split, tl.int64)
        b_lse = tl.load(p_part_lse + (i_plane * heads + o_head) * rows_q + o_row, mask=m_m, other=float("-inf"))
        b_part = tl.load(p_part + i_plane * rows_q * heads * VALUE_DIM + o_out, mask=m_out, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse, propagate_nan=tl.PropagateNan.ALL)
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp((b_lse - b_base).to(tl.float32))
        b_alpha = tl.exp((b_max - b_base).to(tl.float32))
        b_acc = b_acc * b_alpha[:, None] + b_part * b_weight[:, None]
        b_sum = b_sum * b_alpha + b_weight
        b_max = b_new_max
    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = log_sum_exp(b_max, b_sum, p_lse.dtype.element_ty)
    tl.store(p_lse + o_head.to(tl.int64) * rows_q + o_row, b_lse, mask=m_m)
    tl.store(p_out + o_out, narrow(b_acc / b_norm[:, None], p_out.dtype.element_ty), mask=m_out)
