"""Triton kernel of retrieval: each program keeps the best k of its share of the corpus, and the lists are merged.

A candidate is one integer: the score's bits, made to order as scores do (NaN first), above the row counted backwards.
So candidates are distinct, the largest integer is the best candidate, and of equal scores the first row wins.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastxattn.ops.attention.triton.common import dot
from fastxattn.ops.retrieval.problem import Problem


def tile(rows: int, columns: int, features: int, steps: int, warps: int, stages: int) -> dict[str, int]:
    """A launch configuration: queries, corpus rows, features of a step, steps between two partial sums."""
    sizes = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": features, "STEPS": steps}
    return sizes | {"num_warps": warps, "num_stages": stages}


TILES = {16: tile(16, 64, 32, 2, 4, 3), 64: tile(64, 64, 32, 2, 8, 1)}
"""By the most queries of a block."""
PROGRAMS, MOST_CHUNKS = 512, 1024
NOTHING = tl.constexpr(-(1 << 63))


@triton.jit
def topk_kernel(
    p_query, p_corpus, p_factor, p_lists, queries, rows, features, stride_corpus, chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = (chunk of the corpus, block of queries). Writes (chunks, queries, WIDTH) candidates in no order."""
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    i_chunk = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(i_chunk + chunk, rows)
    o_w = tl.arange(0, WIDTH)
    b_list = tl.zeros((BLOCK_M, WIDTH), tl.int64) + NOTHING + o_w[None, :]
    b_worst = tl.min(b_list, 1)
    for i_n in range(i_chunk, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(0, features, STEPS * BLOCK_K):
            b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_step in tl.static_range(STEPS):
                o_k = i_k + i_step * BLOCK_K + tl.arange(0, BLOCK_K)
                m_k = o_k < features
                p_q = p_query + o_m.to(tl.int64)[:, None] * features + o_k[None, :]
                b_q = tl.load(p_q, mask=m_m[:, None] & m_k[None, :], other=0.0)
                p_c = p_corpus + o_n.to(tl.int64)[None, :] * stride_corpus + o_k[:, None]
                b_c = tl.load(p_c, mask=m_n[None, :] & m_k[:, None], other=0)
                b_part = dot(b_q, b_c.to(tl.float32), b_part, "ieee")
            b_s += b_part
        if p_factor is not None:
            b_s = b_s * tl.load(p_factor + o_n, mask=m_n, other=0.0)[None, :]
        b_s = tl.where(b_s == 0.0, 0.0, b_s)  # -0 is 0
        b_bits = b_s.to(tl.int32, bitcast=True)
        b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
        b_order = tl.where(b_s == b_s, b_order, 0x7FFFFFFF).to(tl.int64)
        b_new = b_order * 4294967296 + (0x7FFFFFFF - (o_n - i_chunk))[None, :]
        b_new = tl.where(m_m[:, None] & m_n[None, :], b_new, NOTHING)
        b_top = tl.max(b_new, 1)
        # Once the lists are warm, hardly a tile holds anything that beats the worst of them.
        while tl.max((b_top > b_worst).to(tl.int32), 0) > 0:
            m_take = b_top > b_worst
            b_list = tl.where(m_take[:, None] & (b_list == b_worst[:, None]), b_top[:, None], b_list)
            b_new = tl.where(b_new == b_top[:, None], NOTHING, b_new)
            b_top = tl.max(b_new, 1)
            b_worst = tl.min(b_list, 1)
    p_lists += (tl.program_id(0).to(tl.int64) * queries + o_m)[:, None] * WIDTH + o_w[None, :]
    tl.store(p_lists, b_list, mask=m_m[:, None])


def topk_similarity(*arguments) -> tuple[Tensor, Tensor]:
    """Run the operator; chunks depend on shapes alone."""
    p = Problem.of(arguments)
    number, rows, width = p.queries.shape[0], p.corpus.shape[0], max(16, triton.next_power_of_2(p.k))
    if number == 0 or rows == 0:
        scores = p.queries.new_full((number, p.k), float("-inf"), dtype=torch.float32)
        return scores, p.queries.new_full((number, p.k), -1, dtype=torch.int64)
    tile = TILES[16 if number <= 16 else 64]
    blocks = triton.cdiv(number, tile["BLOCK_M"])
    chunks = max(1, min(MOST_CHUNKS, PROGRAMS // blocks, triton.cdiv(rows, 16 * tile["BLOCK_N"])))
    chunk = triton.cdiv(triton.cdiv(rows, chunks), tile["BLOCK_N"]) * tile["BLOCK_N"]
    chunks = triton.cdiv(rows, chunk)
    best = p.queries.new_empty((chunks, number, width), dtype=torch.int64)
    stride = p.corpus.stride(0) if rows > 1 else p.corpus.shape[1]
    sizes = (number, rows, p.corpus.shape[1], stride, chunk)
    topk_kernel[(chunks, blocks)](p.queries, p.corpus, p.factor, best, *sizes, **tile, WIDTH=width)
    return _merged(best, chunk, p.k, p.first)


def _merged(best: Tensor, chunk: int, k: int, first: int) -> tuple[Tensor, Tensor]:
    """Each chunk's lists in order, the chunks in order, then a stable sort by score: ties keep the first row."""
    chunks, number, width = best.shape
    kept = best.sort(dim=2, descending=True).values.transpose(0, 1).reshape(number, chunks * width)
    order = (kept >> 32).sort(dim=1, descending=True, stable=True)
    places = order.indices[:, :k]
    low = kept.gather(1, places) & 0xFFFFFFFF
    place = order.values[:, :k].int()
    nothing = place == -(1 << 31)
    scores = (place ^ ((place >> 31) & 0x7FFFFFFF)).view(torch.float32)
    rows = (places // width) * chunk + (0x7FFFFFFF - low) + first
    return torch.where(nothing, -torch.inf, scores), torch.where(nothing, -1, rows)
