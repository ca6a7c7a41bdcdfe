"""Public function: the attention that every key receives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastxattn.ops.arguments import default_scale
from fastxattn.ops.importance.backends import run
from fastxattn.ops.importance.checks import check_reduction
from fastxattn.ops.importance.problem import Problem


def key_importance(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "max", "none"] = "mean",
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Compute the attention that every key receives: column sums of the attention map, which is never stored.

    For head h, key j, and the queries i of its sequence that see it::

        score_hj = sum_i row_weight_hi * exp(s_hij - lse_hi)        s as in varlen_cross_attention

    reduced over heads. One pass over the keys, exact, bitwise repeatable.

    Args:
        query: (total_q, heads, head_dim) float32, bfloat16, float16 or float64.
        key: (total_k, kv_heads, head_dim); kv_heads divides heads.
        lse: (heads, total_q) float32, as ``varlen_cross_attention(..., return_lse=True)`` returns it. It may come
            from a larger set of keys than ``key``.
        cu_seqlens_q: (batch + 1,) int32, offsets of the queries, or of ``query_index`` when given.
        cu_seqlens_k: (batch + 1,) int32, offsets of the keys, or of ``key_index`` when given.
        max_seqlen_q: ignored; accepted so that call sites match attention's.
        max_seqlen_k: ignored.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None. It and the next three are those of the forward pass.
        softcap: soft limit on scores; 0 is off.
        kv_range: (total_q, 2) int32; query i sees keys [start, end) of its own sequence.
        key_bias: (total_k,) or (total_k, heads) float32.
        query_index: (chosen,) int32; only these rows of ``query`` count, each at most once. The class token's row, or
            the last row of a prompt, makes a probe that costs one row instead of all of them.
        key_index: (kept,) int32; the keys are these rows of ``key``.
        row_weight: (total_q,) or (heads, total_q) float32; 1 when None. Weights may be negative.
        reduction: over heads: ``"mean"``, ``"sum"``, ``"max"`` or ``"none"``.
        normalize: divide by the number of queries that see the key (at least 1), so that keys which few queries see
            are not underrated.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        (total_k,) float32, or (heads, total_k) with ``reduction="none"``; with ``key_index`` one score per entry of it.
        Keys that belong to no sequence or that no query sees get 0. Differentiable in query, key, lse, key_bias and
        row_weight.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, offset, index or number is wrong, or there is no such reduction or backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> out, lse = varlen_cross_attention(q, k, v, cu_q, cu_k, return_lse=True)
        >>> score = key_importance(q, k, lse, cu_q, cu_k)

    Column sums as a measure of tokens: Chen et al., FastV (2024); Zhang et al., H2O (2023); Arif et al., HiRED (2024).
    """
    check_reduction(reduction)
    problem = Problem(
        query=query,
        key=key,
        lse=lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_index=query_index,
        key_index=key_index,
        kv_range=kv_range,
        key_bias=key_bias,
        row_weight=row_weight,
        scale=default_scale(query, scale),
        softcap=softcap,
    )
    score = run(problem, backend)
    if normalize:
        score = score / count_queries(problem).clamp(min=1)
    if reduction == "mean":
        return score.mean(0)
    if reduction == "sum":
        return score.sum(0)
    return score.amax(0) if reduction == "max" else score


def count_queries(problem: Problem) -> Tensor:
    """The number of queries that see each key slot, (slots_k,) int64, without a sync or an attention map."""
    p, device = problem, problem.query.device
    offsets_q, offsets_k = p.cu_seqlens_q.long(), p.cu_seqlens_k.long()
    length_q = offsets_q.diff() if p.seqused_q is None else p.seqused_q.long()
    length_k = offsets_k.diff() if p.seqused_k is None else p.seqused_k.long()
    if length_q.shape[0] == 0:
        return torch.zeros(p.slots_k, dtype=torch.long, device=device)
    slot = torch.arange(p.slots_k, device=device)
    sequence = torch.searchsorted(offsets_k[1:], slot, right=True).clamp(max=length_k.shape[0] - 1)
    used = (slot >= offsets_k[sequence]) & (slot - offsets_k[sequence] < length_k[sequence])
    if p.kv_range is None:
        return torch.where(used, length_q[sequence], 0)
    # A query adds one where its range starts and takes it back where it ends; the running sum counts.
    slots_q = p.query.shape[0] if p.query_index is None else p.query_index.shape[0]
    mine = torch.arange(slots_q, device=device)
    home = torch.searchsorted(offsets_q[1:], mine, right=True).clamp(max=length_q.shape[0] - 1)
    valid = mine - offsets_q[home] < length_q[home]
    rows = mine if p.query_index is None else p.query_index.long().clamp(0, max(p.query.shape[0] - 1, 0))
    start, end = p.kv_range[rows].long().unbind(1)
    start, end = start.clamp(min=0), torch.minimum(end, length_k[home])
    step = (valid & (start < end)).long()
    edges = torch.zeros(p.slots_k + 1, dtype=torch.long, device=device)
    edges = edges.index_add(0, (offsets_k[home] + start).clamp(0, p.slots_k), step)
    edges = edges.index_add(0, (offsets_k[home] + end).clamp(0, p.slots_k), -step)
    return torch.where(used, edges.cumsum(0)[:-1], 0)
