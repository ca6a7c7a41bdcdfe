"""Attention backward: the gradient of a padded bias, which may have been broadcast over any of its axes.

A pass of its own: a program owns a block of the bias and walks everything that block was broadcast to.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fastxattn.ops.attention.triton.backward import anchor_of, load_norm, load_statistic
from fastxattn.ops.attention.triton.common import (
    adjust_scores,
    find_span,
    keep_mask_scattered,
    load_ranges,
    load_rows,
    power,
    rows_by_keys,
    unit_of,
)  # fmt: skip


@triton.jit
def find_places(p_cu, p_used, p_slot, slots, rows, i_b, o_place):
    """Row, slot and presence of places of the padded layout in sequence i_b."""
    start = tl.load(p_cu + i_b)
    end = tl.load(p_cu + i_b + 1)
    o_row = tl.minimum(tl.maximum(start + o_place, 0), rows - 1)
    m_place = start + o_place < tl.minimum(end, rows)
    o_slot = o_place
    if p_slot is not None:
        o_slot = tl.load(p_slot + o_row, mask=m_place, other=-1)
    _, length = find_span(p_cu, p_used, slots, i_b)
    return o_row, o_slot, m_place & (o_slot >= 0) & (o_slot < length)


@triton.jit
def attention_backward_bias(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_norm, p_dbias, p_cu_q, p_cu_k, p_used_q, p_used_k, p_slot_q, p_slot_k,
    p_range, p_key_bias, p_bias, p_seed, rows_q, rows_k, slots_q, slots_k, batch, heads, stride_qr, stride_qh,
    stride_kr, stride_kh, stride_vr, stride_vh, stride_or, stride_oh, stride_key_bias, stride_bias_b, stride_bias_h,
    stride_bias_q, stride_bias_k, bias_heads, bias_rows, bias_columns, places_q, places_k, scale, softcap, dropout_p,
    BATCH_SHARED: tl.constexpr, HEADS_SHARED: tl.constexpr, ROWS_SHARED: tl.constexpr, COLUMNS_SHARED: tl.constexpr,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = a block of the bias; sums over everything that block was broadcast to.

    The bias is (batch|1, heads|1, places_q|1, places_k|1), its gradient contiguous float32. It goes by places, which
    are rows of the padded layout: p_slot_q/k give the slot in its sequence that a row stands in, -1 for none (None:
    slot = place).
    """
    i_program = tl.program_id(0)
    UNIT: tl.constexpr = unit_of(p_q.dtype.element_ty)
    blocks_k = 1 if COLUMNS_SHARED else tl.cdiv(places_k, BLOCK_N)
    blocks_q = 1 if ROWS_SHARED else tl.cdiv(places_q, BLOCK_M)
    i_block_k = i_program % blocks_k
    i_block_q = i_program // blocks_k % blocks_q
    i_head = i_program // blocks_k // blocks_q % bias_heads
    i_batch = i_program // blocks_k // blocks_q // bias_heads
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_b in range(i_batch, batch if BATCH_SHARED else i_batch + 1):
        i_b64 = tl.cast(i_b, tl.int64)
        for i_h in range(i_head, heads if HEADS_SHARED else i_head + 1):
            i_h64 = tl.cast(i_h, tl.int64)
            for i_m in range(i_block_q, tl.cdiv(places_q, BLOCK_M) if ROWS_SHARED else i_block_q + 1):
                o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
                o_row, _slot, m_m = find_places(p_cu_q, p_used_q, p_slot_q, slots_q, rows_q, i_b, o_m)
                o_head = o_m * 0 + i_h
                b_q = load_rows(p_q + i_h64 * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)
                b_do = load_rows(p_dout + i_h64 * stride_oh, o_row, stride_or, m_m, True, VALUE_DIM, BLOCK_DV)
                _, length_k = find_span(p_cu_k, p_used_k, slots_k, i_b)
                b_lse = anchor_of(p_lse, o_row, o_head, rows_q, m_m, length_k, p_norm is not None, UNIT)
                b_delta = load_statistic(p_delta, o_row, o_head, rows_q, m_m)
                for i_n in range(i_block_k, tl.cdiv(places_k, BLOCK_N) if COLUMNS_SHARED else i_block_k + 1):
                    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
                    o_row_k, o_slot, m_n = find_places(p_cu_k, p_used_k, p_slot_k, slots_k, rows_k, i_b, o_n)
                    i_kv64 = i_h64 // GROUP
                    b_k = load_rows(p_k + i_kv64 * stride_kh, o_row_k, stride_kr, m_n, True, HEAD_DIM, BLOCK_D)
                    b_v = load_rows(p_v + i_kv64 * stride_vh, o_row_k, stride_vr, m_n, True, VALUE_DIM, BLOCK_DV)
                    m_seen = m_m[:, None] & m_n[None, :]
                    b_s = rows_by_keys(b_q, b_k, p_norm is not None, PRECISION)
                    b_s, _tanh = adjust_scores(
                        b_s, p_key_bias, p_bias + i_b64 * stride_bias_b, o_row[:, None], o_row_k[None, :],
                        o_m[:, None], o_n[None, :], o_head[:, None], m_seen,
                        stride_key_bias, stride_bias_q, stride_bias_k, stride_bias_h, scale, softcap, UNIT, SOFTCAP,
                        KEY_BIAS_HEADS,
                    )  # fmt: skip
                    if p_range is not None:
                        b_start, b_end = load_ranges(p_range, o_row, m_m, slots_k)
                        m_seen &= (o_slot[None, :] >= b_start[:, None]) & (o_slot[None, :] < b_end[:, None])
                    b_p = power(b_s - b_lse[:, None], UNIT)
                    if p_norm is not None:
                        b_p = b_p / load_norm(p_norm, o_row, o_head, rows_q, m_m)[:, None]
                    b_dp = rows_by_keys(b_do, b_v, p_norm is not None, PRECISION)
                    if p_seed is not None:
                        b_keep = keep_mask_scattered(p_seed, o_row, o_slot, o_head, dropout_p)
                        b_dp = tl.where(b_keep, b_dp / (1.0 - dropout_p), 0.0)
                    b_sum += tl.where(m_seen, b_p * (b_dp - b_delta[:, None]), 0.0)

    i_plane = i_batch.to(tl.int64) * bias_heads + i_head
    o_row = i_block_q * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = i_block_k * BLOCK_N + tl.arange(0, BLOCK_N)
    p_plane = p_dbias + i_plane * bias_rows * bias_columns
    if ROWS_SHARED:
        b_row = tl.sum(b_sum, 0)
        if COLUMNS_SHARED:
            tl.store(p_plane, tl.sum(b_row, 0))
        else:
            tl.store(p_plane + o_column, b_row, mask=o_column < bias_columns)
    else:
        if COLUMNS_SHARED:
            tl.store(p_plane + o_row, tl.sum(b_sum, 1), mask=o_row < bias_rows)
        else:
            p_block = p_plane + o_row.to(tl.int64)[:, None] * bias_columns + o_column[None, :]
            tl.store(p_block, b_sum, mask=(o_row < bias_rows)[:, None] & (o_column < bias_columns)[None, :])
