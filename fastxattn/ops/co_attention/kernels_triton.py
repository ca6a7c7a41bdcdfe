"""Co-attention in Triton: two attention forwards, and a backward kernel that shares the scores.

One forward pass over the scores would save one product of four, but the programs that own rows of one side would have
to leave partial sums of the other in memory: for every 128 rows as many bytes as the product saves in time on no GPU
that was considered (docs/design/triton.md). Backward needs no such sums: a program owns rows of one side, meets
all of the other, and computes both directions' share of its own rows from one tile of scores, so that two launches
with the sides swapped make ten products where four launches made fourteen. Imported with the first call.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxattn.ops.attention.triton.backward import anchor_of, load_norm, load_statistic
from fastxattn.ops.attention.triton.common import (
    across,
    adjust_scores,
    dot,
    find_sequence,
    find_span,
    keep_mask,
    load_rows,
    narrow,
    power,
    rows_by_keys,
    unit_of,
)
from fastxattn.ops.attention.triton.launch import (
    Launch,
    attention_backward,
    attention_forward,
    count_tiles,
    dense_rows,
    exact_rows,
    on_device,
    padded_dim,
    precision,
    warps_of,
)
from fastxattn.ops.attention.triton.tiles import Tile
from fastxattn.ops.co_attention.problem import SIDES, Problem, roles
from fastxattn.runtime import tuning

TILES = {
    "half": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "single": {64: Tile(16, 16, 8, 1), 128: Tile(16, 16, 8, 1)},  # wider ones go one direction after the other
}
"""Of the backward kernel, by kind and widest head dim."""
Grads = dict[str, Tensor]


@triton.jit
def load_bias(p_bias, o_row, i_head, m_row, stride_row, stride_head, UNIT: tl.constexpr):
    """The bias of rows in score units; 0 without one."""
    if p_bias is None:
        b_bias = o_row * 0.0
    else:
        p_bias += o_row.to(tl.int64) * stride_row + i_head * stride_head
        b_bias = UNIT * tl.load(p_bias, mask=m_row, other=0.0)
    return b_bias


@triton.jit
def co_attention_backward_rows(
    p_qx, p_qy, p_vx, p_vy, p_dox, p_doy, p_lse_x, p_lse_y, p_delta_x, p_delta_y, p_norm_x, p_norm_y, p_bias_x,
    p_bias_y, p_seed_x, p_seed_y, p_dqx, p_dvx, p_dbias_x, p_cu_x, p_cu_y, rows_x, rows_y, batch, heads,
    stride_qxr, stride_qxh, stride_qyr, stride_qyh, stride_vxr, stride_vxh, stride_vyr, stride_vyh, stride_oxr,
    stride_oxh, stride_oyr, stride_oyh, stride_bias_xr, stride_bias_xh, stride_bias_yr, stride_bias_yh, scale, softcap,
    dropout_p,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_X: tl.constexpr, DIM_Y: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (block of rows of side x, head); walks side y of the sequence. Writes dQ, dV and dbias of its rows.

    do_x has the width of v_y and the other way round. Results are contiguous: (rows, heads, dim) and (heads, rows).
    """
    UNIT: tl.constexpr = unit_of(p_qx.dtype.element_ty)
    EXACT: tl.constexpr = p_norm_x is not None
    i_program = tl.program_id(0)
    i_head = i_program % heads
    i_b, i_block = find_sequence(p_cu_x, batch, i_program // heads, 1, BLOCK_M)
    start_x, length_x = find_span(p_cu_x, None, rows_x, i_b)
    start_y, length_y = find_span(p_cu_y, None, rows_y, i_b)
    if (i_block < 0) | (i_block * BLOCK_M >= length_x):
        return
    i_head64 = i_head.to(tl.int64)
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < length_x
    o_x = tl.minimum(start_x + o_m, rows_x - 1)
    o_head_x = o_x * 0 + i_head
    b_q = load_rows(p_qx + i_head64 * stride_qxh, o_x, stride_qxr, m_m, True, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_vx + i_head64 * stride_vxh, o_x, stride_vxr, m_m, True, DIM_X, BLOCK_X)
    b_do = load_rows(p_dox + i_head64 * stride_oxh, o_x, stride_oxr, m_m, True, DIM_Y, BLOCK_Y)
    b_bias_x = load_bias(p_bias_x, o_x, i_head64, m_m, stride_bias_xr, stride_bias_xh, UNIT)
    b_lse_x = anchor_of(p_lse_x, o_x, o_head_x, rows_x, m_m, length_y, EXACT, UNIT)
    b_delta_x = load_statistic(p_delta_x, o_x, o_head_x, rows_x, m_m)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_M, BLOCK_X), tl.float32)
    b_dbias = tl.zeros((BLOCK_M,), tl.float32)
    for i_first in range(0, length_y, BLOCK_N):
        o_n = i_first + tl.arange(0, BLOCK_N)
        m_n = o_n < length_y
        o_y = tl.minimum(start_y + o_n, rows_y - 1)
        o_head_y = o_y * 0 + i_head
        b_k = load_rows(p_qy + i_head64 * stride_qyh, o_y, stride_qyr, m_n, True, HEAD_DIM, BLOCK_D)
        b_w = load_rows(p_vy + i_head64 * stride_vyh, o_y, stride_vyr, m_n, True, DIM_Y, BLOCK_Y)
        b_dw = load_rows(p_doy + i_head64 * stride_oyh, o_y, stride_oyr, m_n, True, DIM_X, BLOCK_X)
        m_seen = m_m[:, None] & m_n[None, :]
        b_s = rows_by_keys(b_q, b_k, EXACT, PRECISION)  # [BLOCK_M, BLOCK_N]
        o_row_x, o_row_y, o_head = o_x[:, None], o_y[None, :], o_head_x[:, None]
        b_s, b_tanh = adjust_scores(
            b_s,
            None,
            None,
            o_row_x,
            o_row_y,
            o_row_x,
            o_row_y,
            o_head,
            m_seen,
            0,
            0,
            0,
            0,
            scale,
            softcap,
            UNIT,
            SOFTCAP,
            False,
        )
        # x reads y, then y reads x: weights, and their gradients.
        b_bias_y = load_bias(p_bias_y, o_y, i_head64, m_n, stride_bias_yr, stride_bias_yh, UNIT)
        b_p = tl.where(m_seen, power(b_s + b_bias_y[None, :] - b_lse_x[:, None], UNIT), 0.0)
        b_lse_y = anchor_of(p_lse_y, o_y, o_head_y, rows_y, m_n, length_x, EXACT, UNIT)
        b_r = tl.where(m_seen, power(b_s + b_bias_x[:, None] - b_lse_y[None, :], UNIT), 0.0)
        if EXACT:
            b_p = b_p / load_norm(p_norm_x, o_x, o_head_x, rows_x, m_m)[:, None]
            b_r = b_r / load_norm(p_norm_y, o_y, o_head_y, rows_y, m_n)[None, :]
        b_dp = rows_by_keys(b_do, b_w, EXACT, PRECISION)
        b_dr = across(b_v, b_dw, EXACT, PRECISION)
        b_dropped = b_r
        if p_seed_x is not None:
            b_keep = keep_mask(p_seed_x, o_x, i_first, o_head_x, dropout_p, BLOCK_N)
            b_dp = tl.where(b_keep, b_dp / (1.0 - dropout_p), 0.0)
            b_keep = tl.trans(keep_mask(p_seed_y, o_y, i_block * BLOCK_M, o_head_y, dropout_p, BLOCK_M))
            b_dr = tl.where(b_keep, b_dr / (1.0 - dropout_p), 0.0)
            b_dropped = tl.where(b_keep, b_r / (1.0 - dropout_p), 0.0)
        b_dv = dot(narrow(b_dropped, b_dw.dtype), b_dw, b_dv, PRECISION)
        b_delta_y = load_statistic(p_delta_y, o_y, o_head_y, rows_y, m_n)
        b_dr = tl.where(m_seen, b_r * (b_dr - b_delta_y[None, :]), 0.0)
        b_dbias += tl.sum(b_dr, 1)
        b_ds = tl.where(m_seen, b_p * (b_dp - b_delta_x[:, None]), 0.0) + b_dr
        if SOFTCAP:
            b_ds = tl.where(m_seen, b_ds * (1.0 - b_tanh * b_tanh), 0.0)
        b_dq = dot(narrow(b_ds, b_k.dtype), b_k, b_dq, PRECISION)

    o_row = o_x.to(tl.int64) * heads + i_head
    o_d = tl.arange(0, BLOCK_D)
    o_dx = tl.arange(0, BLOCK_X)
    if p_dqx is not None:
        b_dq = narrow(b_dq * scale, p_dqx.dtype.element_ty)
        tl.store(p_dqx + o_row[:, None] * HEAD_DIM + o_d[None, :], b_dq, mask=m_m[:, None] & (o_d < HEAD_DIM)[None, :])
    if p_dvx is not None:
        b_dv = narrow(b_dv, p_dvx.dtype.element_ty)
        tl.store(p_dvx + o_row[:, None] * DIM_X + o_dx[None, :], b_dv, mask=m_m[:, None] & (o_dx < DIM_X)[None, :])
    if p_dbias_x is not None:
        tl.store(p_dbias_x + i_head64 * rows_x + o_x, b_dbias, mask=m_m)


def tile_for(query: Tensor, dim: int) -> Tile:
    """The tuned tile, or the shipped one."""
    kind = "half" if query.element_size() == 2 else "single"
    return tuning.tuned("co_attention", "backward", kind, dim, query.device, Tile) or TILES[kind][dim]


def co_attention_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastxattn::co_attention_triton``."""
    directions = [Problem.of(arguments).direction(reader) for reader in (0, 1)]
    (out_a, lse_a), (out_b, lse_b) = (attention_forward(*one.values()) for one in directions)
    return out_a, out_b, lse_a.float(), lse_b.float()


@tuning.or_shipped
def co_attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``fastxattn::co_attention_backward_triton``: grad_out, out and lse of a and b, the problem, needs."""
    results, fields, needs = arguments[:6], arguments[6:-1], arguments[-1]
    problem = Problem.of(fields)
    wanted = {name for name, bit in Problem.bits.items() if needs & bit}
    grads: Grads = {}
    for name in Problem.bits:
        bias = name.startswith("key_bias")
        like = results[4 + SIDES.index(name[-1])] if bias else getattr(problem, name)
        dtype = torch.float32 if bias else problem.query_a.dtype
        grads[name] = problem.query_a.new_zeros(like.shape if name in wanted else (0,), dtype=dtype)
    rows = (problem.query_a, problem.query_b, problem.value_a, problem.value_b)
    if all(t.numel() for t in rows) and problem.cu_seqlens_a.numel() > 1:
        with on_device(problem.query_a):
            wide = problem.query_a.dtype == torch.float32 and max(t.shape[2] for t in rows) > max(TILES["single"])
            (_one_by_one if wide else _launch)(results, problem, grads, wanted)
    return tuple(grads.values())


def _one_by_one(results: tuple[Tensor, ...], problem: Problem, grads: Grads, wanted: set[str]) -> None:
    """Attention's backward pass of each direction, for heads so wide that no tile of both fits the registers."""
    heads = problem.query_a.shape[1]
    for reader in (0, 1):
        names = roles(reader)
        one = problem.direction(reader)
        if one.key_bias is not None and one.key_bias.ndim == 1:
            one = one.replace(key_bias=one.key_bias[:, None].expand(-1, heads).contiguous())
        needs = sum(bit for name, bit in one.bits.items() if names.get(name) in wanted)
        grad_out, out, lse = results[reader::2]
        found = attention_backward(grad_out, None, out, lse, *one.values(), needs)
        for name, grad in zip(one.bits, found, strict=True):
            if (to := names.get(name)) in wanted:
                grads[to] += grad.T if name == "key_bias" else grad


def _launch(results: tuple[Tensor, ...], problem: Problem, grads: Grads, wanted: set[str]) -> None:
    sides = [_side(problem, results, reader) for reader in (0, 1)]
    query, batch = problem.query_a, problem.cu_seqlens_a.numel() - 1
    heads, head_dim = query.shape[1:]
    tile = tile_for(query, max(64, *(padded_dim(t.shape[2]) for t in (query, problem.value_a, problem.value_b))))
    shared = {
        "batch": batch,
        "heads": heads,
        "scale": problem.scale,
        "softcap": problem.softcap,
        "dropout_p": problem.dropout_p,
        "SOFTCAP": problem.softcap != 0.0,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": precision(),
        "num_warps": warps_of(tile, query),
        "num_stages": tile.stages,
    }
    for reader, name in enumerate(SIDES):
        x, y = sides[reader], sides[1 - reader]
        mine = {"p_dqx": f"query_{name}", "p_dvx": f"value_{name}", "p_dbias_x": f"key_bias_{name}"}
        if not wanted & set(mine.values()):
            continue
        co_attention_backward_rows[(count_tiles(x["rows_@"], batch, 1, tile.block_m) * heads,)](
            **{key.replace("@", "x").replace("#", "X"): value for key, value in x.items()},
            **{key.replace("@", "y").replace("#", "Y"): value for key, value in y.items()},
            **{key: grads[grad] if grad in wanted else None for key, grad in mine.items()},
            **shared,
        )


def _side(problem: Problem, results: tuple[Tensor, ...], reader: int) -> dict[str, Any]:
    """The kernel's arguments about one side, with @ for its letter and # for that in capitals."""
    letter, one = SIDES[reader], problem.direction(reader)
    query, value = (dense_rows(getattr(problem, f"{name}_{letter}")) for name in ("query", "value"))
    bias = getattr(problem, f"key_bias_{letter}")
    grad_out, out, lse = results[reader::2]
    grad_out, out, lse = dense_rows(grad_out), out.contiguous(), lse.contiguous()
    norm = None
    if query.dtype == torch.float32:
        norm, delta = exact_rows(Launch.of(one), out, grad_out, lse)
    else:
        delta = (out.float() * grad_out).sum(2).T.contiguous()
    side = {
        "p_q@": query,
        "p_v@": value,
        "p_do@": grad_out,
        "p_lse_@": lse,
        "p_delta_@": delta,
        "p_norm_@": norm,
        "p_bias_@": bias,
        "p_seed_@": one.dropout_seed if problem.dropout_p else None,
        "p_cu_@": one.cu_seqlens_q,
        "rows_@": query.shape[0],
        "stride_bias_@r": 0 if bias is None else bias.stride(0),
        "stride_bias_@h": 0 if bias is None or bias.ndim == 1 else bias.stride(1),
        "DIM_#": value.shape[2],
        "BLOCK_#": padded_dim(value.shape[2]),
    }
    for name, t in (("q", query), ("v", value), ("o", grad_out)):
        side |= {f"stride_{name}@r": t.stride(0), f"stride_{name}@h": t.stride(1)}
    return side
