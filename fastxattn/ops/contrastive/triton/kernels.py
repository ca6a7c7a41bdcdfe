"""Device code of the contrastive losses: a tile of the similarity matrix at a time, none of it kept.

``x`` and ``y`` are the two sides, rows of the tile and columns; statistics of the other direction come from the same
kernel with the sides exchanged. A logit is ``(scale * (product * (norm_x * norm_y))) + bias``, which rounds alike from
both sides, so that ranks see exact ties.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fastxattn.ops.attention.triton.common import dot, narrow

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def products(x, y, features, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr):
    """[M, N] inner products of rows in float32, added up apart every STEPS * K features when STEPS > 1.

    ``x`` and ``y``: pointer, rows, which of them are in the matrix, stride.
    """
    p_x, o_x, m_x, stride_x = x
    p_y, o_y, m_y, stride_y = y
    p_x += o_x.to(tl.int64)[:, None] * stride_x
    p_y += o_y.to(tl.int64)[None, :] * stride_y
    b_sum = tl.zeros((M, N), tl.float32)
    for i_k in range(0, features, STEPS * K):
        b_part = tl.zeros((M, N), tl.float32) if STEPS > 1 else b_sum
        for i_step in tl.static_range(STEPS):
            o_k = i_k + i_step * K + tl.arange(0, K)
            b_x = tl.load(p_x + o_k[None, :], mask=m_x[:, None] & (o_k < features)[None, :], other=0.0)
            b_y = tl.load(p_y + o_k[:, None], mask=m_y[None, :] & (o_k < features)[:, None], other=0.0)
            b_part = dot(b_x, b_y, b_part, "ieee")
        b_sum = b_sum + b_part if STEPS > 1 else b_part
    return b_sum


@triton.jit
def pairs(x, y, EXCLUDE_SELF: tl.constexpr):
    """The product's factor of each pair (1 without norms), and which pairs are positives and negatives.

    ``x`` and ``y``: norms, ids, ids to skip, rows, which of them are in the matrix.
    """
    p_norm_x, p_id_x, p_skip_x, o_x, m_x = x
    p_norm_y, p_id_y, p_skip_y, o_y, m_y = y
    b_factor = 1.0
    if p_norm_x is not None:
        b_factor = tl.load(p_norm_x + o_x, mask=m_x, other=0.0)[:, None]
        b_factor = b_factor * tl.load(p_norm_y + o_y, mask=m_y, other=0.0)[None, :]
    m_live = m_x[:, None] & m_y[None, :]
    if EXCLUDE_SELF:
        m_live = m_live & (o_x[:, None] != o_y[None, :])
    b_id_x = tl.load(p_id_x + o_x, mask=m_x, other=-1)[:, None]
    b_id_y = tl.load(p_id_y + o_y, mask=m_y, other=-2)[None, :]
    m_positive = m_live & (b_id_x == b_id_y)
    m_negative = m_live & (b_id_x != b_id_y)
    if p_skip_x is not None:
        b_skip_x = tl.load(p_skip_x + o_x, mask=m_x, other=-1)[:, None]
        m_negative = m_negative & (b_skip_x != tl.load(p_skip_y + o_y, mask=m_y, other=-2)[None, :])
    return b_factor, m_positive, m_negative


@triton.jit
def bias_of(p_bias):
    """The bias, 0 when there is none."""
    bias = 0.0
    if p_bias is not None:
        bias = tl.load(p_bias)
    return bias


@triton.jit
def logits(
    x,
    y,
    features,
    scale,
    bias,
    EXCLUDE_SELF: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A tile's logits, its products times their factor, that factor, and which pairs are positives and negatives.

    ``x`` and ``y``: pointer, norms, ids, ids to skip, rows, which of them are in the matrix, stride.
    """
    p_x, p_norm_x, p_id_x, p_skip_x, o_x, m_x, stride_x = x
    p_y, p_norm_y, p_id_y, p_skip_y, o_y, m_y, stride_y = y
    b_cosine = products((p_x, o_x, m_x, stride_x), (p_y, o_y, m_y, stride_y), features, M, N, K, STEPS)
    side_x, side_y = (p_norm_x, p_id_x, p_skip_x, o_x, m_x), (p_norm_y, p_id_y, p_skip_y, o_y, m_y)
    b_factor, m_pos, m_neg = pairs(side_x, side_y, EXCLUDE_SELF)
    b_cosine = b_cosine * b_factor
    return b_cosine * scale + bias, b_cosine, b_factor, m_pos, m_neg


@triton.jit
def exact_or(p_exact, b_z, o_x, o_y, m_x, m_y, BY_ROW: tl.constexpr):
    """Logits of positives: the precise ones, which belong to rows (or, sides exchanged, to columns), else b_z."""
    if p_exact is not None:
        if BY_ROW:
            b_exact = tl.load(p_exact + o_x, mask=m_x, other=0.0)[:, None]
        else:
            b_exact = tl.load(p_exact + o_y, mask=m_y, other=0.0)[None, :]
        b_z = tl.broadcast_to(b_exact, b_z.shape)
    return b_z


@triton.jit
def within(m_pair, b_z, b_limit):
    """The pairs whose logit is not above the limit; NaN is not."""
    return m_pair & ((b_z > b_limit) == 0)


@triton.jit
def any_of(m_pair):
    """Whether a tile has a pair."""
    return tl.max(tl.max(m_pair.to(tl.int32), 1), 0) > 0


@triton.jit
def add_exponentials(b_top, b_exp, b_z, m_pair):
    """Running (maximum, sum of exponentials around it) of each row with the tile's pairs added."""
    b_new = tl.maximum(b_top, tl.max(tl.where(m_pair, b_z, LOWEST), 1))
    b_safe = tl.where(b_new == LOWEST, 0.0, b_new)
    b_terms = tl.where(m_pair, tl.exp(b_z - b_safe[:, None]), 0.0)
    return b_new, b_exp * tl.exp(b_top - b_safe) + tl.sum(b_terms, 1)


@triton.jit
def stats_kernel(
    p_x, p_y, p_scale, p_bias, p_norm_x, p_norm_y, p_id_x, p_id_y, p_skip_x, p_skip_y, p_exact, p_limit, p_rank,
    p_state, rows_x, rows_y, features, stride_x, stride_y,
    EXACT_BY_ROW: tl.constexpr, EXCLUDE_SELF: tl.constexpr, MEANS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program = (block of x's rows, share of y's rows). Writes running statistics (SPLITS, 9, rows_x)."""
    i_split = tl.program_id(0) % SPLITS
    o_x = tl.program_id(0) // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    m_x = o_x < rows_x
    scale = tl.load(p_scale)
    bias = bias_of(p_bias)
    b_top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_exp = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    b_ahead = tl.zeros((BLOCK_M,), tl.float32)
    b_top_pos = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_exp_pos = tl.zeros((BLOCK_M,), tl.float32)
    b_sum_pos = tl.zeros((BLOCK_M,), tl.float32)
    b_count_pos = tl.zeros((BLOCK_M,), tl.float32)
    share = tl.cdiv(tl.cdiv(rows_y, BLOCK_N), SPLITS) * BLOCK_N
    for i_first in range(i_split * share, tl.minimum((i_split + 1) * share, rows_y), BLOCK_N):
        o_y = i_first + tl.arange(0, BLOCK_N)
        m_y = o_y < rows_y
        x = (p_x, p_norm_x, p_id_x, p_skip_x, o_x, m_x, stride_x)
        y = (p_y, p_norm_y, p_id_y, p_skip_y, o_y, m_y, stride_y)
        b_z, _cosine, _factor, m_pos, m_neg = logits(
            x, y, features, scale, bias, EXCLUDE_SELF, BLOCK_M, BLOCK_N, BLOCK_K, STEPS
        )
        if p_limit is not None:
            m_neg = within(m_neg, b_z, tl.load(p_limit + o_x, mask=m_x, other=0.0)[:, None])
        b_top, b_exp = add_exponentials(b_top, b_exp, b_z, m_neg)
        if MEANS:
            b_sum += tl.sum(tl.where(m_neg, b_z, 0.0), 1)
            b_count += tl.sum(m_neg.to(tl.float32), 1)
            if p_rank is not None:
                m_ahead = m_neg & (b_z >= tl.load(p_rank + o_x, mask=m_x, other=0.0)[:, None])
                b_ahead += tl.sum(m_ahead.to(tl.float32), 1)
        if any_of(m_pos):
            b_pos = exact_or(p_exact, b_z, o_x, o_y, m_x, m_y, EXACT_BY_ROW)
            b_top_pos, b_exp_pos = add_exponentials(b_top_pos, b_exp_pos, b_pos, m_pos)
            b_sum_pos += tl.sum(tl.where(m_pos, b_pos, 0.0), 1)
            b_count_pos += tl.sum(m_pos.to(tl.float32), 1)
    plane = tl.cast(rows_x, tl.int64)  # an argument of 1 is a constant to the compiler, and has no methods
    p_state += i_split.to(tl.int64) * 9 * rows_x + o_x
    tl.store(p_state, b_top, mask=m_x)
    tl.store(p_state + plane, b_exp, mask=m_x)
    tl.store(p_state + plane * 2, b_sum, mask=m_x)
    tl.store(p_state + plane * 3, b_count, mask=m_x)
    tl.store(p_state + plane * 4, b_ahead, mask=m_x)
    tl.store(p_state + plane * 5, b_top_pos, mask=m_x)
    tl.store(p_state + plane * 6, b_exp_pos, mask=m_x)
    tl.store(p_state + plane * 7, b_sum_pos, mask=m_x)
    tl.store(p_state + plane * 8, b_count_pos, mask=m_x)


@triton.jit
def positive_kernel(
    p_x, p_y, p_scale, p_bias, p_norm_x, p_norm_y, p_target, p_sums, rows_x, rows_y, features, stride_x, stride_y,
    BLOCKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The logit of each row with its target: summed in float64, or BLOCKED: as the tiles of the statistics round it.

    Without a target: 0, or BLOCKED: infinity, which no negative reaches.
    """
    o_x = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_x = o_x < rows_x
    o_y = tl.load(p_target + o_x, mask=m_x, other=-1)
    m_has = (o_y >= 0) & (o_y < rows_y)
    scale = tl.load(p_scale)
    bias = bias_of(p_bias)
    b_factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if p_norm_x is not None:
        b_factor = tl.load(p_norm_x + o_x, mask=m_x, other=0.0) * tl.load(p_norm_y + o_y, mask=m_has, other=0.0)
    if BLOCKED:
        x, y = (p_x, o_x, m_x, stride_x), (p_y, o_y, m_has, stride_y)
        b_z = products(x, y, features, BLOCK_M, BLOCK_M, BLOCK_K, STEPS)
        b_z = b_z * b_factor[:, None] * scale + bias
        o_m = tl.arange(0, BLOCK_M)
        b_own = tl.sum(tl.where(o_m[:, None] == o_m[None, :], b_z, 0.0), 1)
        tl.store(p_sums + o_x, tl.where(m_has, b_own, float("inf")), mask=m_x)
    else:
        b_sum = tl.zeros((BLOCK_M,), tl.float64)
        p_x += o_x.to(tl.int64)[:, None] * stride_x
        p_y += o_y.to(tl.int64)[:, None] * stride_y
        for i_k in range(0, features, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = m_has[:, None] & (o_k < features)[None, :]
            b_x = tl.load(p_x + o_k[None, :], mask=m_k, other=0.0).to(tl.float32).to(tl.float64)
            b_sum += tl.sum(b_x * tl.load(p_y + o_k[None, :], mask=m_k, other=0.0).to(tl.float32).to(tl.float64), 1)
        b_own = (b_sum * b_factor.to(tl.float64) * scale.to(tl.float64) + bias).to(tl.float32)
        tl.store(p_sums + o_x, tl.where(m_has, b_own, 0.0), mask=m_x)


@triton.jit
def negative_slope(p_slopes, o, rows, m_in, b_z, AXIS: tl.constexpr):
    """What one direction adds to the slope of its negatives; o are that direction's rows, along b_z's other axis."""
    m, plane = o < rows, tl.cast(rows, tl.int64)
    b_lse = tl.expand_dims(tl.load(p_slopes + o, mask=m, other=0.0), AXIS)
    b_grad = tl.expand_dims(tl.load(p_slopes + plane + o, mask=m, other=0.0), AXIS)
    b_mean = tl.expand_dims(tl.load(p_slopes + plane * 2 + o, mask=m, other=0.0), AXIS)
    return tl.where(m_in, b_grad * tl.exp(b_z - b_lse) + b_mean, 0.0)


@triton.jit
def positive_slope(p_slopes, o, rows, b_z, AXIS: tl.constexpr):
    """The same of its positives: their share of the mean and of the excess, which is exactly 0 for a single one."""
    m, plane = o < rows, tl.cast(rows, tl.int64)
    b_lse = tl.expand_dims(tl.load(p_slopes + plane * 3 + o, mask=m, other=0.0), AXIS)
    b_share = tl.expand_dims(tl.load(p_slopes + plane * 4 + o, mask=m, other=0.0), AXIS)
    b_mean = tl.expand_dims(tl.load(p_slopes + plane * 5 + o, mask=m, other=0.0), AXIS)
    b_excess = tl.expand_dims(tl.load(p_slopes + plane * 6 + o, mask=m, other=0.0), AXIS)
    return b_excess * (tl.exp(b_z - b_lse) - b_share) + b_mean * b_share


@triton.jit
def store_dz(p_dz, plane, b_dz):
    """Slopes in float32, or as a sum of two bfloat16 numbers, a plane each."""
    if p_dz.dtype.element_ty == tl.float32:
        tl.store(p_dz, b_dz)
    else:
        b_high = narrow(b_dz, tl.bfloat16)
        tl.store(p_dz, b_high)
        tl.store(p_dz + plane, narrow(b_dz - b_high.to(tl.float32), tl.bfloat16))


@triton.jit
def slope_kernel(
    p_x, p_y, p_scale, p_bias, p_norm_x, p_norm_y, p_id_x, p_id_y, p_skip_x, p_skip_y, p_exact, p_limit, p_limit_y,
    p_slopes, p_slopes_y, p_dz, p_dot, i_x, i_y, rows_x, rows_y, features, stride_x, stride_y, stride_dz,
    plane_dz,
    EXCLUDE_SELF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The slopes dz of a window of the matrix that starts at (i_x, i_y), times what a product's slope is.

    Program = (block of rows, block of columns). Also writes (column blocks, stride_dz) sums of dz * logit / scale.
    """
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x, o_y = i_x + o_m, i_y + o_n
    m_x, m_y = o_x < rows_x, o_y < rows_y
    scale = tl.load(p_scale)
    x = (p_x, p_norm_x, p_id_x, p_skip_x, o_x, m_x, stride_x)
    y = (p_y, p_norm_y, p_id_y, p_skip_y, o_y, m_y, stride_y)
    b_z, b_cosine, b_factor, m_pos, m_neg = logits(
        x, y, features, scale, bias_of(p_bias), EXCLUDE_SELF, BLOCK_M, BLOCK_N, BLOCK_K, STEPS
    )
    b_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ROWS:
        m_in = m_neg
        if p_limit is not None:
            m_in = within(m_neg, b_z, tl.load(p_limit + o_x, mask=m_x, other=0.0)[:, None])
        b_dz += negative_slope(p_slopes, o_x, rows_x, m_in, b_z, 1)
    if COLUMNS:
        m_in = m_neg
        if p_limit_y is not None:
            m_in = within(m_neg, b_z, tl.load(p_limit_y + o_y, mask=m_y, other=0.0)[None, :])
        b_dz += negative_slope(p_slopes_y, o_y, rows_y, m_in, b_z, 0)
    if any_of(m_pos):
        b_pos = exact_or(p_exact, b_z, o_x, o_y, m_x, m_y, True)
        b_slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if ROWS:
            b_slope += positive_slope(p_slopes, o_x, rows_x, b_pos, 1)
        if COLUMNS:
            b_slope += positive_slope(p_slopes_y, o_y, rows_y, b_pos, 0)
        b_dz = tl.where(m_pos, b_slope, b_dz)
    b_dot = tl.sum(tl.where(m_pos | m_neg, b_dz * b_cosine, 0.0), 1)
    tl.store(p_dot + tl.program_id(1) * stride_dz + o_m, b_dot)
    if p_dz is not None:
        p_dz += o_m.to(tl.int64)[:, None] * stride_dz + o_n[None, :]
        store_dz(p_dz, plane_dz, b_dz * (b_factor * scale))


@triton.jit
def log1p_unit(b_e):
    """log(1 + e) for e in [0, 1] by the series of 2 atanh(e / (2 + e)): tl.log(1 + e) would lose small terms."""
    b_t = b_e / (2.0 + b_e)
    b_q = b_t * b_t
    b_y = b_q * (2.0 / 15.0) + 2.0 / 13.0
    b_y = b_y * b_q + 2.0 / 11.0
    b_y = b_y * b_q + 2.0 / 9.0
    b_y = b_y * b_q + 2.0 / 7.0
    b_y = b_y * b_q + 2.0 / 5.0
    b_y = b_y * b_q + 2.0 / 3.0
    b_y = b_y * b_q + 2.0
    return b_t * b_y


@triton.jit
def sigmoid_kernel(
    p_x, p_y, p_scale, p_bias, p_norm_x, p_norm_y, p_id_x, p_id_y, p_skip_x, p_skip_y, p_exact, p_weight,
    p_dz, p_part, i_x, i_y, rows_x, rows_y, features, stride_x, stride_y, stride_dz,
    plane_dz,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """As slope_kernel, of the sigmoid loss: p_part (3, column blocks, stride_dz) gets sums of loss, dz * cosine, dz."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x, o_y = i_x + o_m, i_y + o_n
    m_x, m_y = o_x < rows_x, o_y < rows_y
    scale = tl.load(p_scale)
    x = (p_x, p_norm_x, p_id_x, p_skip_x, o_x, m_x, stride_x)
    y = (p_y, p_norm_y, p_id_y, p_skip_y, o_y, m_y, stride_y)
    b_z, b_cosine, b_factor, m_pos, m_neg = logits(
        x, y, features, scale, bias_of(p_bias), EXCLUDE_SELF, BLOCK_M, BLOCK_N, BLOCK_K, STEPS
    )
    b_z = tl.where(m_pos, -exact_or(p_exact, b_z, o_x, o_y, m_x, m_y, True), b_z)
    m_live = m_pos | m_neg
    b_e = tl.exp(tl.where(b_z > 0, -b_z, b_z))  # NaN stays NaN
    b_loss = tl.where(m_live, tl.where(b_z > 0, b_z, 0.0) + log1p_unit(b_e), 0.0)
    p_part += tl.program_id(1).to(tl.int64) * stride_dz + o_m
    plane = tl.num_programs(1).to(tl.int64) * stride_dz
    tl.store(p_part, tl.sum(b_loss, 1))
    b_chance = tl.where(b_z > 0, 1.0, b_e) / (1.0 + b_e)
    b_dz = tl.where(m_pos, -b_chance, b_chance)
    if p_weight is not None:
        b_dz = b_dz * tl.load(p_weight + o_x, mask=m_x, other=0.0)[:, None]
    b_dz = tl.where(m_live, b_dz, 0.0)
    tl.store(p_part + plane, tl.sum(tl.where(m_live, b_dz * b_cosine, 0.0), 1))
    tl.store(p_part + plane * 2, tl.sum(b_dz, 1))
    if p_dz is not None:
        p_dz += o_m.to(tl.int64)[:, None] * stride_dz + o_n[None, :]
        store_dz(p_dz, plane_dz, b_dz * (b_factor * scale))
