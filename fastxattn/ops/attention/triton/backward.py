"""Attention backward: a pass by rows for dQ and delta, one by keys for dK, dV and the key bias, one for the bias.

With P = exp(S - lse) and delta_i = sum_j P_ij dP_ij - dlse_i::

    dP = dropout(dout V^T)    dS = P * (dP - delta)    dV = dropout(P)^T dout
    dQ = scale * dC K         dK = scale * dC^T Q      dC = dS * (1 - tanh^2) under a soft cap, else dS

In 16 bits delta is out . dout, the same number up to what rounding has done to out. In float32 nothing else is rounded
and three things would show: a rounded lse, which scales a whole row of P; the difference S - lse, which is larger than
S; and a delta that does not cancel dP in rows of few keys. There scores are taken against :func:`anchor_of` instead,
and a first pass by rows (:func:`attention_backward_sums`) finds what P adds up to, by which rows are divided, and how
far delta is from out . dout.

Every program owns what it writes, so results are bitwise repeatable.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fastxattn.ops.attention.triton.common import (
    across,
    adjust_scores,
    dot_seen,
    find_places,
    find_rows,
    find_sequence,
    find_span,
    find_tile,
    keep_mask,
    keep_mask_scattered,
    load_ranges,
    load_rows,
    narrow,
    power,
    rows_by_keys,
    span_of_keys,
    unit_of,
)  # fmt: skip


@triton.jit
def load_statistic(p_x, o_row, o_head, rows_q, m_row):
    """A (heads, rows) float32 statistic at these rows; -inf (a row that saw no key) comes back as 0."""
    b_x = tl.load(p_x + o_head.to(tl.int64) * rows_q + o_row, mask=m_row, other=0.0)
    return tl.where(b_x == float("-inf"), 0.0, b_x)


@triton.jit
def anchor_of(p_lse, o_row, o_head, rows_q, m_row, length_k, EXACT: tl.constexpr, UNIT: tl.constexpr):
    """What scores are compared with: lse, or (EXACT) about their mean, which the rows' sums make up for."""
    b_lse = load_statistic(p_lse, o_row, o_head, rows_q, m_row)
    if EXACT:
        b_lse -= tl.log(tl.maximum(length_k, 1).to(tl.float32))
    return b_lse * UNIT


@triton.jit
def load_norm(p_norm, o_row, o_head, rows_q, m_row):
    """What the weights of these rows add up to; 1 where nothing is there, or NaN, which is for those who are seen."""
    b_norm = tl.load(p_norm + o_head.to(tl.int64) * rows_q + o_row, mask=m_row, other=1.0)
    return tl.where(b_norm == b_norm, b_norm, 1.0)


@triton.jit
def row_step(
    b_q, b_do, b_lse, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range, b_start, b_end, start_k,
    length_k, rows_k, batch, o_row, o_pos, o_head, m_m, stride_kr, stride_vr, stride_key_bias, stride_bias_h,
    stride_bias_q, stride_bias_k, scale, softcap, dropout_p,
    SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys, its P (0 where unseen) and dP [BLOCK_M, BLOCK_N], tanh of the cap, and who sees whom."""
    UNIT: tl.constexpr = unit_of(b_q.dtype)
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = o_n < length_k
    o_row_k = find_rows(p_index_k, start_k + o_n, rows_k, m_n)
    b_k = load_rows(p_k, o_row_k, stride_kr, m_n, True, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, o_row_k, stride_vr, m_n, True, VALUE_DIM, BLOCK_DV)
    m_seen = m_m[:, None] & m_n[None, :]
    b_s = rows_by_keys(b_q, b_k, b_q.dtype == tl.float32, PRECISION)
    o_pos_k = find_places(p_bias, o_row_k, start_k, rows_k, batch)
    b_s, b_tanh = adjust_scores(
        b_s, p_key_bias, p_bias, o_row[:, None], o_row_k[None, :], o_pos[:, None], o_pos_k[None, :],
        o_head[:, None], m_seen, stride_key_bias, stride_bias_q, stride_bias_k, stride_bias_h, scale, softcap, UNIT,
        SOFTCAP, KEY_BIAS_HEADS,
    )  # fmt: skip
    if p_range is not None:
        m_seen = (o_n[None, :] >= b_start[:, None]) & (o_n[None, :] < b_end[:, None])
    b_p = tl.where(m_seen, power(b_s - b_lse[:, None], UNIT), 0.0)
    b_dp = rows_by_keys(b_do, b_v, b_q.dtype == tl.float32, PRECISION)
    if p_seed is not None:
        b_keep = keep_mask(p_seed, o_row, i_first, o_head, dropout_p, BLOCK_N)
        b_dp = tl.where(b_keep, b_dp / (1.0 - dropout_p), 0.0)
    return b_k, b_p, b_dp, b_tanh, m_seen


@triton.jit
def attention_backward_sums(
    p_q, p_k, p_v, p_dout, p_lse, p_center, p_totals, p_rests, p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q,
    p_index_k, p_range, p_key_bias, p_bias, p_seed, rows_q, rows_k, slots_q, slots_k, batch, kv_heads, stride_qr,
    stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_or, stride_oh, stride_key_bias, stride_bias_b,
    stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of rows, key/value head, chunk of keys). Writes sum P and sum P (dP - center) by row.

    center (heads, rows) is out . dout: sums of what is left above it keep their accuracy. totals and rests are
    (SPLITS, heads, rows), zeroed.
    """
    nothing, i_b, i_kv, i_split, chunk, start_q, start_k, length_k, m_m, o_head, o_row = find_tile(
        p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k, batch, kv_heads, GROUP, BLOCK_M,
        BLOCK_N, SPLITS, SPLIT_KEYS,
    )  # fmt: skip
    if nothing:
        return
    heads = kv_heads * GROUP
    o_head64 = o_head.to(tl.int64)
    b_do = load_rows(p_dout + o_head64[:, None] * stride_oh, o_row, stride_or, m_m, True, VALUE_DIM, BLOCK_DV)
    b_q = load_rows(p_q + o_head64[:, None] * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)
    b_lse = anchor_of(p_lse, o_row, o_head, rows_q, m_m, length_k, True, unit_of(p_q.dtype.element_ty))
    b_center = load_statistic(p_center, o_row, o_head, rows_q, m_m)
    i_low, i_high, b_start, b_end = span_of_keys(p_range, o_row, m_m, length_k, chunk, i_split, SPLITS, BLOCK_N)
    if p_bias is not None:
        p_bias += i_b.to(tl.int64) * stride_bias_b
    p_k += i_kv.to(tl.int64) * stride_kh
    p_v += i_kv.to(tl.int64) * stride_vh
    o_pos = find_places(p_bias, o_row, start_q, rows_q, batch)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    b_rest = tl.zeros((BLOCK_M,), tl.float32)
    for i_first in range(i_low, i_high, BLOCK_N):
        _k, b_p, b_dp, _tanh, m_seen = row_step(
            b_q, b_do, b_lse, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range, b_start, b_end,
            start_k, length_k, rows_k, batch, o_row, o_pos, o_head, m_m, stride_kr, stride_vr, stride_key_bias,
            stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p, SOFTCAP, KEY_BIAS_HEADS, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
        b_total += tl.sum(b_p, 1)
        b_rest += tl.sum(tl.where(m_seen, b_p * (b_dp - b_center[:, None]), 0.0), 1)
    o_sum = (i_split.to(tl.int64) * heads + o_head) * rows_q + o_row
    tl.store(p_totals + o_sum, b_total, mask=m_m)
    tl.store(p_rests + o_sum, b_rest, mask=m_m)


@triton.jit
def attention_backward_query(
    p_q, p_k, p_v, p_out, p_dout, p_lse, p_dlse, p_delta, p_norm, p_dq, p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q,
    p_index_k, p_range, p_key_bias, p_bias, p_seed, rows_q, rows_k, slots_q, slots_k, batch, kv_heads, stride_qr,
    stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_or, stride_oh, stride_key_bias, stride_bias_b,
    stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p,
    NEED_DQ: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of rows, key/value head, chunk of keys). Writes dQ as (SPLITS, rows, heads, HEAD_DIM).

    Without p_norm it writes delta too; with it, delta is there already. p_out is contiguous (rows, heads, VALUE_DIM);
    dout has strides. With SPLITS > 1 dQ is float32 parts to be summed.
    """
    nothing, i_b, i_kv, i_split, chunk, start_q, start_k, length_k, m_m, o_head, o_row = find_tile(
        p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, rows_q, slots_q, slots_k, batch, kv_heads, GROUP, BLOCK_M,
        BLOCK_N, SPLITS, SPLIT_KEYS,
    )  # fmt: skip
    if nothing:
        return
    heads = kv_heads * GROUP
    o_head64 = o_head.to(tl.int64)
    b_do = load_rows(p_dout + o_head64[:, None] * stride_oh, o_row, stride_or, m_m, True, VALUE_DIM, BLOCK_DV)
    if p_norm is None:
        b_out = load_rows(p_out, o_row.to(tl.int64) * heads + o_head, VALUE_DIM, m_m, True, VALUE_DIM, BLOCK_DV)
        b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
        if p_dlse is not None:
            b_delta -= tl.load(p_dlse + o_head64 * rows_q + o_row, mask=m_m, other=0.0)
        if i_split == 0:
            tl.store(p_delta + o_head64 * rows_q + o_row, b_delta, mask=m_m)
    else:
        b_delta = load_statistic(p_delta, o_row, o_head, rows_q, m_m)
    if NEED_DQ:
        b_q = load_rows(p_q + o_head64[:, None] * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)
        UNIT: tl.constexpr = unit_of(p_q.dtype.element_ty)
        b_lse = anchor_of(p_lse, o_row, o_head, rows_q, m_m, length_k, p_norm is not None, UNIT)
        i_low, i_high, b_start, b_end = span_of_keys(p_range, o_row, m_m, length_k, chunk, i_split, SPLITS, BLOCK_N)
        if p_bias is not None:
            p_bias += i_b.to(tl.int64) * stride_bias_b
        p_k += i_kv.to(tl.int64) * stride_kh
        p_v += i_kv.to(tl.int64) * stride_vh
        o_pos = find_places(p_bias, o_row, start_q, rows_q, batch)
        b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for i_first in range(i_low, i_high, BLOCK_N):
            b_k, b_p, b_dp, b_tanh, m_seen = row_step(
                b_q, b_do, b_lse, i_first, p_k, p_v, p_index_k, p_key_bias, p_bias, p_seed, p_range, b_start, b_end,
                start_k, length_k, rows_k, batch, o_row, o_pos, o_head, m_m, stride_kr, stride_vr, stride_key_bias,
                stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p, SOFTCAP, KEY_BIAS_HEADS,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
            )  # fmt: skip
            b_ds = tl.where(m_seen, b_p * (b_dp - b_delta[:, None]), 0.0)
            if SOFTCAP:
                b_ds = tl.where(m_seen, b_ds * (1.0 - b_tanh * b_tanh), 0.0)
            b_dq = dot_seen(b_ds, b_k, b_dq, m_seen, p_range is not None, PRECISION)
        if p_norm is not None:
            b_dq = b_dq / load_norm(p_norm, o_row, o_head, rows_q, m_m)[:, None]
        o_d = tl.arange(0, BLOCK_D)
        o_plane = i_split.to(tl.int64) * rows_q + o_row
        p_dq_rows = p_dq + (o_plane * heads + o_head)[:, None] * HEAD_DIM + o_d[None, :]
        b_dq = narrow(b_dq * scale, p_dq.dtype.element_ty)
        tl.store(p_dq_rows, b_dq, mask=m_m[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def attention_backward_key(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_norm, p_dk, p_dv, p_dkey_bias, p_cu_q, p_cu_k, p_used_q, p_used_k,
    p_index_q, p_index_k, p_range, p_key_bias, p_bias, p_seed, rows_q, rows_k, slots_q, slots_k, batch, kv_heads,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_or, stride_oh, stride_key_bias,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, dropout_p,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (block of key slots, key/value head); walks the sequence's rows, scores transposed: [keys, rows].

    Writes by key *slot*: dK (slots, kv_heads, HEAD_DIM), dV, and dkey_bias (slots, heads), or (slots, kv_heads) sums
    over the group unless KEY_BIAS_HEADS. All contiguous.
    """
    i_program = tl.program_id(0)
    UNIT: tl.constexpr = unit_of(p_q.dtype.element_ty)
    i_kv = i_program % kv_heads
    i_b, i_block = find_sequence(p_cu_k, batch, i_program // kv_heads, 1, BLOCK_N)
    start_q, length_q = find_span(p_cu_q, p_used_q, slots_q, i_b)
    start_k, length_k = find_span(p_cu_k, p_used_k, slots_k, i_b)
    i_first = i_block * BLOCK_N
    if (i_first < 0) | (i_first >= length_k):
        return
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = o_n < length_k
    o_row_k = find_rows(p_index_k, start_k + o_n, rows_k, m_n)
    b_k = load_rows(p_k + i_kv.to(tl.int64) * stride_kh, o_row_k, stride_kr, m_n, True, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v + i_kv.to(tl.int64) * stride_vh, o_row_k, stride_vr, m_n, True, VALUE_DIM, BLOCK_DV)
    if p_bias is not None:
        p_bias += i_b.to(tl.int64) * stride_bias_b
    o_pos_k = find_places(p_bias, o_row_k, start_k, rows_k, batch)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    HEAD_SUMS: tl.constexpr = GROUP if KEY_BIAS_HEADS else 1
    o_sum = tl.arange(0, triton.next_power_of_2(HEAD_SUMS))
    if p_dkey_bias is not None:
        b_dkey_bias = tl.zeros((BLOCK_N, triton.next_power_of_2(HEAD_SUMS)), tl.float32)

    for i_m in range(0, length_q * GROUP, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < length_q * GROUP
        o_head = i_kv * GROUP + o_m % GROUP
        o_row = find_rows(p_index_q, start_q + o_m // GROUP, rows_q, m_m)
        m_seen = m_n[:, None] & m_m[None, :]  # [BLOCK_N, BLOCK_M]
        any_seen = True
        if p_range is not None:
            b_start, b_end = load_ranges(p_range, o_row, m_m, length_k)
            m_seen = (o_n[:, None] >= b_start[None, :]) & (o_n[:, None] < b_end[None, :])
            any_seen = (tl.min(b_start, 0) < i_first + BLOCK_N) & (tl.max(b_end, 0) > i_first)
        if any_seen:
            b_q = load_rows(
                p_q + o_head.to(tl.int64)[:, None] * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D
            )
            b_lse = anchor_of(p_lse, o_row, o_head, rows_q, m_m, length_k, p_norm is not None, UNIT)
            b_delta = load_statistic(p_delta, o_row, o_head, rows_q, m_m)
            b_s = across(b_k, b_q, p_norm is not None, PRECISION)
            o_pos = find_places(p_bias, o_row, start_q, rows_q, batch)
            b_s, b_tanh = adjust_scores(
                b_s, p_key_bias, p_bias, o_row[None, :], o_row_k[:, None], o_pos[None, :],
                o_pos_k[:, None], o_head[None, :], m_n[:, None] & m_m[None, :], stride_key_bias,
                stride_bias_q, stride_bias_k, stride_bias_h, scale, softcap, UNIT, SOFTCAP, KEY_BIAS_HEADS,
            )  # fmt: skip
            b_p = tl.where(m_seen, power(b_s - b_lse[None, :], UNIT), 0.0)
            if p_norm is not None:
                b_p = b_p / load_norm(p_norm, o_row, o_head, rows_q, m_m)[None, :]
            p_dout_rows = p_dout + o_head.to(tl.int64)[:, None] * stride_oh
            b_do = load_rows(p_dout_rows, o_row, stride_or, m_m, True, VALUE_DIM, BLOCK_DV)
            b_dp = across(b_v, b_do, p_norm is not None, PRECISION)
            b_dropped = b_p
            if p_seed is not None:
                b_keep = tl.trans(keep_mask(p_seed, o_row, i_first, o_head, dropout_p, BLOCK_N))
                b_dropped = tl.where(b_keep, b_p / (1.0 - dropout_p), 0.0)
                b_dp = tl.where(b_keep, b_dp / (1.0 - dropout_p), 0.0)
            b_dv = dot_seen(b_dropped, b_do, b_dv, m_seen, p_range is not None, PRECISION)
            b_ds = tl.where(m_seen, b_p * (b_dp - b_delta[None, :]), 0.0)
            if p_dkey_bias is not None:
                if HEAD_SUMS == 1:
                    b_dkey_bias += tl.sum(b_ds, 1)[:, None]
                else:
                    for i_g in tl.static_range(HEAD_SUMS):
                        b_one = tl.sum(tl.where((o_m % GROUP == i_g)[None, :], b_ds, 0.0), 1)
                        b_dkey_bias += tl.where((o_sum == i_g)[None, :], b_one[:, None], 0.0)
            if SOFTCAP:
                b_ds = tl.where(m_seen, b_ds * (1.0 - b_tanh * b_tanh), 0.0)
            b_dk = dot_seen(b_ds, b_q, b_dk, m_seen, p_range is not None, PRECISION)

    o_slot = (start_k + o_n).to(tl.int64) * kv_heads + i_kv
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    if p_dk is not None:
        b_dk = narrow(b_dk * scale, p_dk.dtype.element_ty)
        tl.store(p_dk + o_slot[:, None] * HEAD_DIM + o_d[None, :], b_dk, mask=m_n[:, None] & (o_d < HEAD_DIM)[None, :])
    if p_dv is not None:
        b_dv = narrow(b_dv, p_dv.dtype.element_ty)
        tl.store(
            p_dv + o_slot[:, None] * VALUE_DIM + o_dv[None, :], b_dv, mask=m_n[:, None] & (o_dv < VALUE_DIM)[None, :]
        )
    if p_dkey_bias is not None:
        p_sums = p_dkey_bias + o_slot[:, None] * HEAD_SUMS + o_sum[None, :]
        tl.store(p_sums, b_dkey_bias, mask=m_n[:, None] & (o_sum < HEAD_SUMS)[None, :])


@triton.jit
def rows_of_places(p_cu, p_used, p_slot, slots, rows, places, i_b, o_place):
    """Row, slot and presence of places of the padded layout in sequence i_b."""
    start = tl.load(p_cu + i_b)
    end = tl.load(p_cu + i_b + 1)
    o_row = tl.minimum(tl.maximum(start + o_place, 0), rows - 1)
    m_place = (o_place < places) & (start + o_place < tl.minimum(end, rows))
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
                o_row, _slot, m_m = rows_of_places(p_cu_q, p_used_q, p_slot_q, slots_q, rows_q, places_q, i_b, o_m)
                o_head = o_m * 0 + i_h
                b_q = load_rows(p_q + i_h64 * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)
                b_do = load_rows(p_dout + i_h64 * stride_oh, o_row, stride_or, m_m, True, VALUE_DIM, BLOCK_DV)
                _, length_k = find_span(p_cu_k, p_used_k, slots_k, i_b)
                b_lse = anchor_of(p_lse, o_row, o_head, rows_q, m_m, length_k, p_norm is not None, UNIT)
                b_delta = load_statistic(p_delta, o_row, o_head, rows_q, m_m)
                for i_n in range(i_block_k, tl.cdiv(places_k, BLOCK_N) if COLUMNS_SHARED else i_block_k + 1):
                    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
                    o_row_k, o_slot, m_n = rows_of_places(
                        p_cu_k, p_used_k, p_slot_k, slots_k, rows_k, places_k, i_b, o_n
                    )
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
