"""Triton kernel of key importance, its tile sizes and its launch.

A block of keys stays, the queries pass by, weights are summed along the queries. Imported with the first call.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxattn.ops.attention.triton.common import (
    adjust_scores,
    find_rows,
    find_sequence,
    find_span,
    load_ranges,
    load_rows,
    power,
    rows_by_keys,
    unit_of,
)
from fastxattn.ops.attention.triton.launch import Launch, count_tiles, on_device
from fastxattn.ops.attention.triton.tiles import Tile
from fastxattn.ops.importance.problem import Problem
from fastxattn.runtime import tuning

TILES = {
    "half": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 2)},
    "single": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(32, 16, 8, 1)},
}
"""By kind and widest head dim."""


@triton.jit
def shift_weight(b_lse, b_weight, length_k):
    """Half the logarithm of the number of keys from lse into the weight, as a power of two; what is lost follows.

    The closer scores and lse are, the less of their difference is rounded away. As the C++ kernel does.
    """
    b_half = tl.floor(0.5 * tl.log2(tl.maximum(length_k, 1).to(tl.float32)))
    b_wide = b_lse.to(tl.float64) - b_half.to(tl.float64) * 0.6931471805599453
    b_less = b_wide.to(tl.float32)
    b_factor = (1.0 - (b_wide - b_less.to(tl.float64)).to(tl.float32)) * tl.exp2(-b_half)
    m_usual = tl.abs(b_lse) < 1000.0
    return tl.where(m_usual, b_less, b_lse), tl.where(m_usual, b_weight * b_factor, b_weight)


@triton.jit
def importance(
    p_q, p_k, p_lse, p_row_weight, p_score, p_cu_q, p_cu_k, p_used_q, p_used_k, p_index_q, p_index_k, p_range,
    p_key_bias, rows_q, rows_k, slots_q, slots_k, batch, heads, stride_qr, stride_qh, stride_kr, stride_kh,
    stride_key_bias, stride_weight_h, stride_weight_r, scale, softcap,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_BIAS_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (block of key slots, query head); scores transposed: [keys, queries]. p_score is (heads, slots_k)."""
    UNIT: tl.constexpr = unit_of(p_q.dtype.element_ty)
    i_program = tl.program_id(0)
    i_head = i_program % heads
    i_b, i_block = find_sequence(p_cu_k, batch, i_program // heads, 1, BLOCK_N)
    start_q, length_q = find_span(p_cu_q, p_used_q, slots_q, i_b)
    start_k, length_k = find_span(p_cu_k, p_used_k, slots_k, i_b)
    i_first = i_block * BLOCK_N
    if (i_first < 0) | (i_first >= length_k):
        return
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = o_n < length_k
    o_row_k = find_rows(p_index_k, start_k + o_n, rows_k, m_n)
    i_head64 = i_head.to(tl.int64)
    b_k = load_rows(p_k + i_head64 // GROUP * stride_kh, o_row_k, stride_kr, m_n, True, HEAD_DIM, BLOCK_D)
    b_score = tl.zeros((BLOCK_N,), tl.float32)
    for i_m in range(0, length_q, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < length_q
        o_row = find_rows(p_index_q, start_q + o_m, rows_q, m_m)
        m_seen = m_n[:, None] & m_m[None, :]
        any_seen = True
        if p_range is not None:
            b_start, b_end = load_ranges(p_range, o_row, m_m, length_k)
            m_seen = (o_n[:, None] >= b_start[None, :]) & (o_n[:, None] < b_end[None, :])
            any_seen = (tl.min(b_start, 0) < i_first + BLOCK_N) & (tl.max(b_end, 0) > i_first)
        if any_seen:
            b_lse = tl.load(p_lse + i_head64 * rows_q + o_row, mask=m_m, other=0.0)
            b_weight = 1.0
            if p_row_weight is not None:
                p_weight = p_row_weight + i_head64 * stride_weight_h + o_row.to(tl.int64) * stride_weight_r
                b_weight = tl.load(p_weight, mask=m_m, other=0.0)
            # A query that sees nothing adds nothing, whatever its weight.
            b_weight = tl.where(b_lse == float("-inf"), 0.0, b_weight)
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * UNIT)
            if UNIT == 1.0:
                b_lse, b_weight = shift_weight(b_lse, b_weight, length_k)
            b_q = load_rows(p_q + i_head64 * stride_qh, o_row, stride_qr, m_m, True, HEAD_DIM, BLOCK_D)
            b_s = rows_by_keys(b_k, b_q, UNIT == 1.0, PRECISION)  # [BLOCK_N, BLOCK_M]
            o_head = o_row * 0 + i_head
            o_row_q, o_row_key, m_both = o_row[None, :], o_row_k[:, None], m_n[:, None] & m_m[None, :]
            b_s, _tanh = adjust_scores(
                b_s,
                p_key_bias,
                None,
                o_row_q,
                o_row_key,
                o_row_q,
                o_row_key,
                o_head[None, :],
                m_both,
                stride_key_bias,
                0,
                0,
                0,
                scale,
                softcap,
                UNIT,
                SOFTCAP,
                KEY_BIAS_HEADS,
            )
            b_p = power(b_s - b_lse[None, :], UNIT) * b_weight[None, :]
            b_score += tl.sum(tl.where(m_seen, b_p, 0.0), 1)
    tl.store(p_score + i_head64 * slots_k + start_k + o_n, b_score, mask=m_n)


def tile_for(query: Tensor, dim: int) -> Tile:
    """The tuned tile, or the shipped one."""
    kind = "half" if query.element_size() == 2 else "single"
    return tuning.tuned("importance", "importance", kind, dim, query.device, Tile) or TILES[kind][dim]


@functools.cache
def _names(kernel: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kernel.fn).parameters) | {"num_warps", "num_stages"}


@tuning.or_shipped
def importance_forward(*arguments: Any) -> Tensor:
    """``fastxattn::importance_triton``."""
    problem = Problem.of(arguments)
    host = Launch.of(problem.attention())
    query, heads = host.problem.query, host.problem.query.shape[1]
    score = torch.zeros(heads, problem.slots_k, dtype=torch.float32, device=query.device)
    if score.numel() == 0 or query.shape[0] == 0 or host.problem.batch == 0 or host.problem.key.shape[0] == 0:
        return score
    tile = tile_for(query, max(64, host.dims[0]))
    weight = problem.row_weight
    others = {
        "p_lse": problem.lse.contiguous(),
        "p_row_weight": weight,
        "p_score": score,
        "stride_weight_h": weight.stride(0) if weight is not None and weight.ndim == 2 else 0,
        "stride_weight_r": 0 if weight is None else weight.stride(-1),
    }
    with on_device(query):
        programs = count_tiles(problem.slots_k, host.problem.batch, 1, tile.block_n) * heads
        host.start(importance, programs, tile, **others)
    return score
