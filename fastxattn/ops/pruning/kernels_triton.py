# ruff: noqa: D103  (the six launchers and their kernels are documented in problem.py and reference.py)
"""Triton kernels of pruning: the same six operations, the same indices.

Selection and quantiles search the cut-off bit by bit: a score becomes an integer that orders as scores do, and 33
counts over the sequence fix its bits from the top (bit 32: protected). Every reduction has a fixed order, so results
repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxattn.ops.attention.triton.common import find_rows, find_span
from fastxattn.ops.pruning.problem import MAX_MIN, Gather, Greedy, Match, Merge, Quantile, Select
from fastxattn.ops.pruning.reference import FLOOR, kept_offsets
from fastxattn.ops.pruning.segments import inverse_norms, members_by_row
from fastxattn.runtime.triton import interpreted

SELECT_BLOCK, ROW_BLOCK = 1024, 256
MATCH_M, MATCH_N, MATCH_K = 64, 64, 32
GREEDY_N, GREEDY_K = 64, 64


@triton.jit
def order_key(score, guarded):
    """int64 that orders as (protected, not NaN, score): NaN is 0, -0 and 0 are equal, protected adds bit 32."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.where((bits & 0x80000000) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, 0, key)
    return tl.where(guarded, key | 0x100000000, key)


@triton.jit
def load_keys(p_scores, p_protected, at, mask, HAS_PROTECTED: tl.constexpr):
    score = tl.load(p_scores + at, mask=mask, other=0.0)
    guarded = at < 0
    if HAS_PROTECTED:
        guarded = tl.load(p_protected + at, mask=mask, other=0) != 0
    return tl.where(mask, order_key(score, guarded), -1)


@triton.jit
def kth_key(p_scores, p_protected, begin, n, rank, HAS_PROTECTED: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the ``rank``-th best token: the largest T that at least so many keys reach."""
    cut = (n * 0).to(tl.int64)
    for step in range(33):
        candidate = cut | (tl.full((), 1, tl.int64) << (32 - step))
        reached = n * 0
        for start in range(0, n, BLOCK):
            o = start + tl.arange(0, BLOCK)
            key = load_keys(p_scores, p_protected, begin + o, o < n, HAS_PROTECTED)
            reached += tl.sum((key >= candidate).to(tl.int32))
        cut = tl.where(reached >= rank, candidate, cut)
    return cut


@triton.jit
def select_kernel(
    p_scores,
    p_protected,
    p_cu,
    p_cu_keep,
    p_keep,
    p_assignment,
    total,
    capacity,
    HAS_PROTECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0)
    begin, n = find_span(p_cu, None, total, i_b)
    place, wanted = find_span(p_cu_keep, None, capacity, i_b)
    wanted = tl.minimum(wanted, n)
    if wanted > 0:
        cut = kth_key(p_scores, p_protected, begin, n, wanted, HAS_PROTECTED, BLOCK)
        above = n * 0
        for start in range(0, n, BLOCK):
            o = start + tl.arange(0, BLOCK)
            key = load_keys(p_scores, p_protected, begin + o, o < n, HAS_PROTECTED)
            above += tl.sum((key > cut).to(tl.int32))
        ties = wanted - above
        for start in range(0, n, BLOCK):
            o = start + tl.arange(0, BLOCK)
            key = load_keys(p_scores, p_protected, begin + o, o < n, HAS_PROTECTED)
            tie = (key == cut).to(tl.int32)
            keep = (key > cut) | ((tie != 0) & (tl.cumsum(tie) <= ties))
            ties -= tl.sum(tie)
            kept = keep.to(tl.int32)
            to = place + tl.cumsum(kept) - 1
            tl.store(p_keep + to, begin + o, mask=keep)
            tl.store(p_assignment + begin + o, to, mask=keep)
            place += tl.sum(kept)


@triton.jit
def quantile_kernel(p_scores, p_cu, p_q, p_out, total, Q, BLOCK: tl.constexpr):
    i_b, i_q = tl.program_id(0), tl.program_id(1)
    begin, n = find_span(p_cu, None, total, i_b)
    numbers = n * 0
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        score = tl.load(p_scores + begin + o, mask=o < n, other=float("nan"))
        numbers += tl.sum((score == score).to(tl.int32))
    value = float("nan")
    if numbers > 0:
        place = tl.load(p_q + i_q).to(tl.float64) * (numbers - 1).to(tl.float64)
        low = place.to(tl.int32)
        share = (place - low.to(tl.float64)).to(tl.float32)
        value = key_score(kth_key(p_scores, p_scores, begin, n, numbers - low, False, BLOCK))
        if share != 0.0:
            high = key_score(kth_key(p_scores, p_scores, begin, n, numbers - low - 1, False, BLOCK))
            value = tl.where(high == value, value, value + (high - value) * share)
    tl.store(p_out + i_b * Q + i_q, value)


@triton.jit
def key_score(key):
    bits = tl.where((key & 0x80000000) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def gather_kernel(p_x, p_index, p_coefficient, p_out, rows, C, HAS_COEFFICIENT: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(p_index + i_row).to(tl.int64)
    known = (source >= 0) & (source < rows)
    row = tl.load(p_x + source * C + o_c, mask=o_c < tl.where(known, C, 0), other=0.0)
    if HAS_COEFFICIENT:
        factor = tl.where(known, tl.load(p_coefficient + i_row), 0.0)
        row = row.to(tl.float32) * factor
    tl.store(p_out + i_row * C + o_c, row.to(p_out.dtype.element_ty), mask=o_c < C)


@triton.jit
def merge_kernel(
    p_x, p_members, p_first, p_coefficient, p_out, total_rows, C, HAS_COEFFICIENT: tl.constexpr, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(tl.load(p_first + i_row + 1), total_rows)
    for at in range(tl.maximum(tl.load(p_first + i_row), 0), end):
        source = tl.load(p_members + at).to(tl.int64)
        source = tl.minimum(tl.maximum(source, 0), total_rows - 1)
        row = tl.load(p_x + source * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        if HAS_COEFFICIENT:
            row = row * tl.load(p_coefficient + source)
        total += row
    tl.store(p_out + i_row * C + o_c, total.to(p_out.dtype.element_ty), mask=o_c < C)


@triton.jit
def match_kernel(
    p_x,
    p_inverse,
    p_a,
    p_cu_a,
    p_b,
    p_cu_b,
    p_best,
    p_similarity,
    rows,
    rows_a,
    rows_b,
    C,
    EXCLUDE_SELF: tl.constexpr,
    UPCAST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    i_b = tl.program_id(0)
    a_begin, a_count = find_span(p_cu_a, None, rows_a, i_b)
    b_begin, b_count = find_span(p_cu_b, None, rows_b, i_b)
    a_end, b_end = a_begin + a_count, b_begin + b_count
    o_m = a_begin + tl.program_id(1) * M + tl.arange(0, M)
    if a_begin + tl.program_id(1) * M < a_end:
        m_m = o_m < a_end
        a_row = find_rows(p_a, o_m, rows, m_m).to(tl.int64)
        a_scale = tl.load(p_inverse + a_row, mask=m_m, other=0.0)
        best = tl.full((M,), float("-inf"), tl.float32)
        where = tl.full((M,), -1, tl.int32)
        for start in range(b_begin, b_end, N):
            o_n = start + tl.arange(0, N)
            b_row = find_rows(p_b, o_n, rows, o_n < b_end).to(tl.int64)
            b_scale = tl.load(p_inverse + b_row, mask=o_n < b_end, other=float("nan"))
            products = tl.zeros((M, N), tl.float32)
            for k in range(0, C, K):
                o_k = k + tl.arange(0, K)
                b_a = tl.load(
                    p_x + a_row[:, None] * C + o_k[None, :],
                    mask=(a_scale == a_scale)[:, None] & (o_k < C)[None, :],
                    other=0.0,
                )
                b_b = tl.load(
                    p_x + b_row[None, :] * C + o_k[:, None],
                    mask=(b_scale == b_scale)[None, :] & (o_k < C)[:, None],
                    other=0.0,
                )
                if UPCAST:
                    b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
                products = tl.dot(b_a, b_b, products, input_precision="ieee")
            # The scales first: a pair has the same similarity from both sides, and mutual neighbours tie exactly.
            value = products * (a_scale[:, None] * b_scale[None, :])
            usable = (value == value) & (o_n < b_end)[None, :]
            if EXCLUDE_SELF:
                usable = usable & (a_row[:, None] != b_row[None, :])
            value = tl.where(usable, value, float("-inf"))
            top = tl.max(value, 1)
            first = tl.min(tl.where(usable & (value == top[:, None]), o_n[None, :], 0x7FFFFFFF), 1)
            better = top > best
            best = tl.where(better, top, best)
            where = tl.where(better, first, where)
        known = where >= 0
        target = tl.load(
            p_b + tl.where(known, where, b_begin), mask=o_m < tl.where(b_end > b_begin, a_end, 0), other=-1
        )
        tl.store(p_best + o_m, target, mask=m_m)
        tl.store(p_similarity + o_m, tl.where(known, best, float("nan")), mask=m_m)


@triton.jit
def greedy_kernel(
    p_x,
    p_inverse,
    p_quality,
    p_protected,
    p_cu,
    p_counts,
    p_value,
    p_factors,
    p_scores,
    C,
    T,
    max_count,
    MAXMIN: tl.constexpr,
    HAS_PROTECTED: tl.constexpr,
    FLOOR_SHARE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    i_b = tl.program_id(0)
    begin, n = find_span(p_cu, None, T, i_b)
    begin = begin.to(tl.int64)
    count = tl.minimum(tl.minimum(tl.load(p_counts + i_b), n), max_count)
    largest = 0.0
    for start in range(0, n, N):
        o = start + tl.arange(0, N)
        value = tl.load(p_value + begin + o, mask=o < n, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.where(value < float("inf"), value, 0.0)))
    floor = largest * FLOOR_SHARE
    rows = n * 0
    for step in range(count):
        # The pick: the first unpicked protected token, else the first of the best values.
        top = float("-inf")
        pick = n
        seed = n
        for start in range(0, n, N):
            o = start + tl.arange(0, N)
            value = tl.load(p_value + begin + o, mask=o < n, other=float("nan"))
            open_ = value == value
            if HAS_PROTECTED:
                guarded = tl.load(p_protected + begin + o, mask=o < n, other=0) != 0
                seed = tl.minimum(seed, tl.min(tl.where(guarded & open_, o, n)))
            here = tl.max(tl.where(open_, value, float("-inf")))
            first = tl.min(tl.where(open_ & (value == here), o, n))
            take = (first < n) & ((pick == n) | (here > top))
            pick = tl.where(take, first, pick)
            top = tl.where(take, here, top)
        pick = tl.minimum(tl.where(seed < n, seed, pick), n - 1)  # others may have picked all of overlapping sequences
        chosen = tl.load(p_value + begin + pick)
        chosen_scale = tl.load(p_inverse + begin + pick)
        chosen_quality = tl.load(p_quality + begin + pick)
        usable_pick = (chosen_scale == chosen_scale) & (chosen_quality == chosen_quality)
        grows = chosen > 0
        tl.debug_barrier()  # every thread has read the old values before any writes new ones
        for start in range(0, n, N):
            o = start + tl.arange(0, N)
            scale = tl.load(p_inverse + begin + o, mask=o < n, other=0.0)
            quality = tl.load(p_quality + begin + o, mask=o < n, other=0.0)
            usable = (scale == scale) & (quality == quality)
            old = tl.load(p_value + begin + o, mask=o < n, other=0.0)
            likeness = tl.zeros((N,), tl.float32)
            for k in range(0, C, K):
                o_k = k + tl.arange(0, K)
                row = tl.load(p_x + (begin + pick) * C + o_k, mask=o_k < tl.where(usable_pick, C, 0), other=0.0).to(
                    tl.float32
                )
                tile = tl.load(
                    p_x + (begin + o)[:, None] * C + o_k[None, :],
                    mask=((o < n) & usable)[:, None] & (o_k < C)[None, :],
                    other=0.0,
                )
                likeness += tl.sum(tile.to(tl.float32) * row[None, :], 1)
            likeness = tl.where(usable, likeness * scale * tl.where(usable_pick, chosen_scale, 0.0), 0.0)
            new = old
            if MAXMIN:
                base = tl.where(usable & (old == old) & (o * 0 + step == 0), float("inf"), old)
                new = tl.where(usable & (old == old), tl.minimum(base, tl.where(usable_pick, -likeness, base)), base)
            else:
                if grows:
                    factor = likeness * quality * chosen_quality
                    for t in range(rows):
                        p_row = p_factors + (n * 0 + t).to(tl.int64) * T + begin
                        factor -= tl.load(p_row + o, mask=o < n, other=0.0) * tl.load(p_row + pick)
                    factor = factor / tl.sqrt(chosen)
                    tl.store(p_factors + rows.to(tl.int64) * T + begin + o, factor, mask=o < n)
                    left = old - factor * factor
                    new = tl.where(old >= 0, tl.where(left <= floor, 0.0, left), old)
            new = tl.where(o == pick, float("nan"), new)
            tl.store(p_value + begin + o, new, mask=o < n)
        rows += grows.to(tl.int32)
        tl.store(p_scores + begin + pick, -(n * 0 + step).to(tl.float32))
        tl.debug_barrier()


def select(p: Select) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_keep = kept_offsets(p.cu_seqlens, p.counts, p.capacity)
    keep_index = torch.full((p.capacity,), -1, dtype=torch.int32, device=p.scores.device)
    assignment = torch.full((p.scores.shape[0],), -1, dtype=torch.int32, device=p.scores.device)
    if p.cu_seqlens.shape[0] > 1:
        guard = p.scores if p.protected is None else p.protected.to(torch.uint8)
        select_kernel[(p.cu_seqlens.shape[0] - 1,)](
            *(p.scores, guard, p.cu_seqlens, cu_keep, keep_index, assignment),
            *(p.scores.shape[0], p.capacity, p.protected is not None, SELECT_BLOCK),
        )
    if p.x is None:
        return keep_index, cu_keep, assignment, p.scores.new_empty(0)
    return keep_index, cu_keep, assignment, gather(Gather(x=p.x, index=keep_index, coefficient=None))


def gather(p: Gather) -> Tensor:
    rows, channels = p.index.shape[0], p.x.shape[1]
    out = p.x.new_empty(rows, channels)
    if out.numel():
        coefficient = p.index if p.coefficient is None else p.coefficient
        gather_kernel[rows, triton.cdiv(channels, ROW_BLOCK)](
            p.x, p.index, coefficient, out, p.x.shape[0], channels, p.coefficient is not None, ROW_BLOCK
        )
    return out


def merge(p: Merge) -> Tensor:
    channels = p.x.shape[1]
    out = p.x.new_empty(p.rows, channels)
    if out.numel():
        members, first = members_by_row(p.assignment, p.rows)
        coefficient = p.x if p.coefficient is None else p.coefficient
        merge_kernel[p.rows, triton.cdiv(channels, ROW_BLOCK)](
            p.x, members, first, coefficient, out, p.x.shape[0], channels, p.coefficient is not None, ROW_BLOCK
        )
    return out


def match(p: Match, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    best = torch.full_like(p.a_index, -1)
    similarity = torch.full(p.a_index.shape, torch.nan, dtype=torch.float32, device=p.x.device)
    if p.x.shape[0] and p.a_index.shape[0] and p.cu_a.shape[0] > 1:
        upcast = interpreted() and p.x.dtype == torch.bfloat16
        tensors = (p.x, inverse_norms(p.x), p.a_index, p.cu_a, p.b_index, p.cu_b, best, similarity)
        match_kernel[p.cu_a.shape[0] - 1, triton.cdiv(p.a_index.shape[0], MATCH_M)](
            *tensors,
            *(p.x.shape[0], p.a_index.shape[0], p.b_index.shape[0], p.x.shape[1]),
            *(exclude_self, upcast, MATCH_M, MATCH_N, MATCH_K),
        )
    return best, similarity


def greedy(p: Greedy) -> Tensor:
    total, device = p.x.shape[0], p.x.device
    scores = torch.full((total,), -torch.inf, dtype=torch.float32, device=device)
    if total == 0 or p.cu_seqlens.shape[0] < 2:
        return scores
    inverse = inverse_norms(p.x)
    weight = torch.ones_like(scores) if p.quality is None else torch.where(p.quality.isfinite(), p.quality, torch.nan)
    unusable = inverse.isnan() | weight.isnan()
    maxmin = p.mode == MAX_MIN
    if maxmin:
        finite = torch.where(unusable[:, None], torch.nan, p.x)
        every = torch.arange(total, dtype=torch.int32, device=device)
        pairs = Match(x=finite, a_index=every, cu_a=p.cu_seqlens, b_index=every, cu_b=p.cu_seqlens)
        value = -match(pairs, exclude_self=True)[1].nan_to_num(nan=-torch.inf)
        factors = scores
    else:
        value = torch.where(inverse > 0, weight * weight, 0.0)  # a unit row's similarity to itself is 1, not nearly 1
        every = torch.arange(total, device=device, dtype=torch.int32)
        owner = torch.searchsorted(p.cu_seqlens[1:].contiguous(), every, right=True)
        largest = torch.zeros(p.cu_seqlens.shape[0], dtype=torch.float32, device=device)
        largest = largest.scatter_reduce(0, owner, torch.where(unusable, 0.0, value), "amax")
        value = torch.where(value <= FLOOR * largest[owner], 0.0, value)
        factors = torch.empty(max(p.max_count, 1), total, dtype=torch.float32, device=device)
    value = torch.where(unusable, -torch.inf, value).contiguous()
    guard = scores if p.protected is None else p.protected.to(torch.uint8)
    tensors = (p.x, inverse, weight, guard, p.cu_seqlens, p.counts, value, factors, scores)
    flags = (maxmin, p.protected is not None, FLOOR, GREEDY_N, GREEDY_K)
    greedy_kernel[(p.cu_seqlens.shape[0] - 1,)](*tensors, p.x.shape[1], total, p.max_count, *flags)
    return scores


def quantile(p: Quantile) -> Tensor:
    out = p.scores.new_empty(p.cu_seqlens.shape[0] - 1, p.q.shape[0])
    if out.numel():
        quantile_kernel[tuple(out.shape)](
            p.scores, p.cu_seqlens, p.q, out, p.scores.shape[0], p.q.shape[0], SELECT_BLOCK
        )
    return out
