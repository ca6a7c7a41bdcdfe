"""Triton kernels of late interaction: one program per pair of sets forward, a sparse product backward.

Backward, the gradient of a side's tokens is ``W @ other side``, where ``W[t, u]`` is what the pair of tokens adds to
the scores: the gradient of the score where one is the other's best match, or a share of it under a smooth maximum. W is
made a tile at a time. Nothing is added by two programs, so results repeat to the last bit.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxattn.ops.attention.triton.common import dot_seen, find_span
from fastxattn.ops.contrastive.triton.kernels import LOWEST, products
from fastxattn.ops.late_interaction.operator import gradients, results
from fastxattn.ops.late_interaction.problem import Problem, SmoothProblem, smooth_of

ROWS, FEATURES = 32, 64  # tokens and features of a program of the gradient
SMOOTH_ROWS = 32
"""Tokens of a set of a in a tile of 16-bit smooth MaxSim; 64 of them spill on sm_100."""
MANY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def round_tf32(b_x):
    """Float32 to the 11 bits that TF32 products keep, to nearest even; the hardware alone would cut."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_bits = (b_bits + 0xFFF + ((b_bits >> 13) & 1)) & 0xFFFFE000
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def best_along(b_s, m_s, o_place, AXIS: tl.constexpr):
    """The best of each row (AXIS 1) or column, and its place: the first of equals, NaN before all, -1 for none."""
    b_nan = tl.max((m_s & (b_s != b_s)).to(tl.int32), AXIS) > 0
    b_best = tl.max(tl.where(m_s & (b_s == b_s), b_s, LOWEST), AXIS)
    m_best = tl.where(tl.expand_dims(b_nan, AXIS), b_s != b_s, b_s == tl.expand_dims(b_best, AXIS))
    b_at = tl.min(tl.where(m_s & m_best, tl.expand_dims(o_place, 1 - AXIS), MANY), AXIS)
    return tl.where(b_nan, float("nan"), b_best), tl.where(b_at == MANY, -1, b_at)


@triton.jit
def merge(b_best, b_at, b_new, b_new_at, smooth, SMOOTH: tl.constexpr):
    """Two running bests as one, the first of them winning ties; SMOOTH: two running (maximum, sum) pairs."""
    if SMOOTH:
        b_top = tl.maximum(b_best, b_new)
        b_safe = tl.where(b_top == LOWEST, 0.0, b_top)
        b_sum = b_at * tl.exp((b_best - b_safe) / smooth) + b_new_at * tl.exp((b_new - b_safe) / smooth)
        return b_top, b_sum
    else:  # what follows a constant condition would be compiled too
        m_better = (b_new > b_best) | ((b_new != b_new) & (b_best == b_best)) | (b_at < 0)
        m_better = m_better & (b_new_at >= 0)
        return tl.where(m_better, b_new, b_best), tl.where(m_better, b_new_at, b_at)


@triton.jit
def best_of(b_s, m_s, o_place, smooth, SMOOTH: tl.constexpr, AXIS: tl.constexpr):
    """What merge takes, of one tile."""
    if SMOOTH:
        b_top = tl.max(tl.where(m_s, b_s, LOWEST), AXIS)
        b_safe = tl.where(b_top == LOWEST, 0.0, b_top)
        return b_top, tl.sum(tl.where(m_s, tl.exp((b_s - tl.expand_dims(b_safe, AXIS)) / smooth), 0.0), AXIS)
    else:
        return best_along(b_s, m_s, o_place, AXIS)


@triton.jit
def finished(b_best, b_at, smooth, SMOOTH: tl.constexpr):
    """The scores that a running best stands for (0 for none), and what the gradient needs: places or scores."""
    if SMOOTH:
        b_score = tl.where(b_at == 0.0, LOWEST, b_best + smooth * tl.log(b_at))
        return tl.where(b_score == LOWEST, 0.0, b_score), b_score
    else:
        return tl.where(b_at < 0, 0.0, b_best), b_at


@triton.jit
def maxsim_kernel(
    p_a, p_b, p_cu_a, p_cu_b, p_sum_a, p_sum_b, p_best_a, p_best_b, p_value, p_extra, sets_a, sets_b, tokens_a,
    tokens_b, features, smooth, FROM_A: tl.constexpr, FROM_B: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program = (set of a, set of b). A column's best over earlier blocks of rows waits in p_value and p_extra."""
    i_a, i_b = tl.program_id(0) // sets_b, tl.program_id(0) % sets_b
    start_a, length_a = find_span(p_cu_a, None, tokens_a, i_a)
    start_b, length_b = find_span(p_cu_b, None, tokens_b, i_b)
    end_a, end_b = start_a + length_a, start_b + length_b
    total_a = 0.0
    total_b = 0.0
    for i_m in range(start_a, end_a, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < end_a
        b_best = tl.full((BLOCK_M,), LOWEST, tl.float32)
        b_at = tl.full((BLOCK_M,), 0.0, tl.float32) if SMOOTH else tl.full((BLOCK_M,), -1, tl.int32)
        for i_n in range(start_b, end_b, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = o_n < end_b
            left, right = (p_a, o_m, m_m, features), (p_b, o_n, m_n, features)
            b_s = products(left, right, features, BLOCK_M, BLOCK_N, BLOCK_K, STEPS)
            m_s = m_m[:, None] & m_n[None, :]
            if FROM_A:
                b_new, b_new_at = best_of(b_s, m_s, o_n - start_b, smooth, SMOOTH, 1)
                b_best, b_at = merge(b_best, b_at, b_new, b_new_at, smooth, SMOOTH)
            if FROM_B:
                b_new, b_new_at = best_of(b_s, m_s, o_m - start_a, smooth, SMOOTH, 0)
                o_b = o_n.to(tl.int64) * sets_a + i_a
                if i_m > start_a:
                    b_old = tl.load(p_value + o_b, mask=m_n, other=0.0)
                    b_old_at = tl.load(p_extra + o_b, mask=m_n, other=0)
                    b_new, b_new_at = merge(b_old, b_old_at, b_new, b_new_at, smooth, SMOOTH)
                if i_m + BLOCK_M < end_a:
                    tl.store(p_value + o_b, b_new, mask=m_n)
                    tl.store(p_extra + o_b, b_new_at, mask=m_n)
                else:
                    b_score, b_kept = finished(b_new, b_new_at, smooth, SMOOTH)
                    tl.store(p_best_b + o_b, b_kept, mask=m_n)
                    total_b += tl.sum(tl.where(m_n, b_score, 0.0), 0)
        if FROM_A:
            b_score, b_kept = finished(b_best, b_at, smooth, SMOOTH)
            tl.store(p_best_a + o_m.to(tl.int64) * sets_b + i_b, b_kept, mask=m_m)
            total_a += tl.sum(tl.where(m_m, b_score, 0.0), 0)
    if FROM_A:
        tl.store(p_sum_a + tl.program_id(0).to(tl.int64), total_a)
    if FROM_B:
        tl.store(p_sum_b + tl.program_id(0).to(tl.int64), total_b)


@triton.jit
def weights_of(p_grad, p_best, own, other, m_pair, b_s, smooth, SMOOTH: tl.constexpr):
    """What tokens o_own add to their scores by way of tokens o_other, broadcast to a tile.

    ``own`` and ``other``: tokens, their sets and stride of the scores; ``other`` also the sets' starts and number.
    """
    o_own, b_set_own, stride_own = own
    o_other, b_set_other, stride_other, b_start_other, sets_other = other
    o_best = o_own.to(tl.int64) * sets_other + b_set_other
    b_grad = tl.load(p_grad + b_set_own.to(tl.int64) * stride_own + b_set_other * stride_other, mask=m_pair, other=0.0)
    if SMOOTH:
        b_score = tl.load(p_best + o_best, mask=m_pair, other=0.0)
        return tl.where(m_pair, b_grad * tl.exp((b_s - b_score) / smooth), 0.0)
    else:
        b_at = tl.load(p_best + o_best, mask=m_pair, other=-1)
        return tl.where(m_pair & (b_at == o_other - b_start_other), b_grad, 0.0)


@triton.jit
def maxsim_gradient_kernel(
    p_x, p_y, p_cu_x, p_cu_y, p_set_x, p_set_y, p_grad_own, p_grad_met, p_best_x, p_best_y, p_sums, sets_x, sets_y,
    rows_x, rows_y, features, stride_x, stride_y, smooth,
    OWN: tl.constexpr, MET: tl.constexpr, SMOOTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of x's tokens and of BLOCK_D features: OWN by x's best matches, MET by being y's.

    Scores lie at set of x * stride_x + set of y * stride_y.
    """
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = o_m < rows_x
    b_set_x = tl.load(p_set_x + o_m, mask=m_m, other=0)
    m_m = m_m & (b_set_x >= 0) & (b_set_x < sets_x)  # tokens past the last offset are nobody's
    b_start_x = tl.load(p_cu_x + b_set_x, mask=m_m, other=0)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i_n in range(0, rows_y, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < rows_y
        b_set_y = tl.load(p_set_y + o_n, mask=m_n, other=0)
        m_n = m_n & (b_set_y >= 0) & (b_set_y < sets_y)
        b_start_y = tl.load(p_cu_y + b_set_y, mask=m_n, other=0)
        m_pair = m_m[:, None] & m_n[None, :]
        b_s = 0.0
        if SMOOTH:
            left, right = (p_x, o_m, m_m, features), (p_y, o_n, m_n, features)
            b_s = products(left, right, features, BLOCK_M, BLOCK_N, BLOCK_K, 1)
        b_w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if OWN:
            own = (o_m[:, None], b_set_x[:, None], stride_x)
            met = (o_n[None, :], b_set_y[None, :], stride_y, b_start_y[None, :], sets_y)
            b_w += weights_of(p_grad_own, p_best_x, own, met, m_pair, b_s, smooth, SMOOTH)
        if MET:
            own = (o_n[None, :], b_set_y[None, :], stride_y)
            met = (o_m[:, None], b_set_x[:, None], stride_x, b_start_x[:, None], sets_x)
            b_w += weights_of(p_grad_met, p_best_y, own, met, m_pair, b_s, smooth, SMOOTH)
        p_rows = p_y + o_n.to(tl.int64)[:, None] * features + o_d[None, :]
        b_y = tl.load(p_rows, mask=m_n[:, None] & (o_d < features)[None, :], other=0.0).to(tl.float32)
        if PRECISION == "tf32":
            b_w = round_tf32(b_w)
        b_sum = dot_seen(b_w, b_y, b_sum, b_w != 0, True, PRECISION)
    p_sums += o_m.to(tl.int64)[:, None] * features + o_d[None, :]
    tl.store(p_sums, b_sum, mask=(o_m < rows_x)[:, None] & (o_d < features)[None, :])


def _block(tokens: int, sets: int, most: int) -> int:
    """Tokens of a tile: what an average set needs, between 16 and ``most``."""
    return max(16, min(most, triton.next_power_of_2(-(-tokens // max(sets, 1)))))


def _forward(p: Problem) -> tuple[Tensor, ...]:
    n, m = p.sets
    smooth, found = smooth_of(p), results(p)
    if n and m:
        single = p.a.dtype == torch.float32
        block_m = _block(p.a.shape[0], n, SMOOTH_ROWS if smooth is not None and not single else 64)
        # Sets are ragged: whether one needs more than a block of rows is not known here.
        rows = p.b.shape[0] if p.from_b and p.a.shape[0] > block_m else 0
        partial = [torch.empty((rows, n), dtype=kept, device=p.a.device) for kept in (torch.float32, found[3].dtype)]
        tile = {"BLOCK_M": block_m, "BLOCK_N": _block(p.b.shape[0], m, 64), "num_warps": 8, "num_stages": 2}
        sizes = (n, m, p.a.shape[0], p.b.shape[0], p.a.shape[1])
        kinds = {"FROM_A": p.from_a, "FROM_B": p.from_b, "SMOOTH": smooth is not None}
        maxsim_kernel[(n * m,)](
            *(p.a, p.b, p.cu_a, p.cu_b), *found, *partial, *sizes, smooth or 1.0, **kinds, **tile, **_steps(single)
        )
    return tuple(found)


def _steps(single: bool) -> dict[str, int]:
    """How a product runs over the features."""
    return {"BLOCK_K": 32, "STEPS": 4} if single else {"BLOCK_K": 64, "STEPS": 1}


def _backward(kind: type[Problem], *arguments) -> tuple[Tensor, ...]:
    grad_a, grad_b, best_a, best_b, *values, needs = arguments
    p = kind.of(values)
    (n, m), (set_a, set_b), smooth, found = p.sets, p.set_of(), smooth_of(p), gradients(p, needs)
    # Scores lie at (set of a) * m + (set of b).
    side_a = (p.a, p.cu_a, set_a, grad_a, best_a, n, m, p.from_a)
    side_b = (p.b, p.cu_b, set_b, grad_b, best_b, m, 1, p.from_b)
    single = p.a.dtype == torch.float32
    tile = {"BLOCK_M": ROWS, "BLOCK_N": 32, "BLOCK_D": FEATURES, "BLOCK_K": _steps(single)["BLOCK_K"]}
    for out, own, other in (found[0], side_a, side_b), (found[1], side_b, side_a):
        x, y = own[0], other[0]
        if not (out.numel() and y.shape[0] and n and m):
            continue
        grid = (triton.cdiv(x.shape[0], ROWS), triton.cdiv(x.shape[1], FEATURES))
        pointers = [t for pair in zip(own[:5], other[:5], strict=True) for t in pair]
        sizes = (own[5], other[5], x.shape[0], y.shape[0], x.shape[1], own[6], other[6])
        kinds = {"OWN": own[7], "MET": other[7], "SMOOTH": smooth is not None}
        maxsim_gradient_kernel[grid](
            *pointers,
            out,
            *sizes,
            smooth or 1.0,
            **kinds,
            **tile,
            PRECISION="ieee" if single else "tf32",
            num_warps=8,
            num_stages=1,
        )
    return tuple(found)


def maxsim(*values) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _forward(Problem.of(values))


def maxsim_backward(*arguments) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _backward(Problem, *arguments)


def smooth_maxsim(*values) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _forward(SmoothProblem.of(values))


def smooth_maxsim_backward(*arguments) -> tuple[Tensor, ...]:
    """Run the operator."""
    return _backward(SmoothProblem, *arguments)
