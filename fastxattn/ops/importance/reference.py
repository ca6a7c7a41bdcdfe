"""Reference implementation of key importance in eager torch, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention.reference import slot_rows, visible_runs
from fastxattn.ops.importance.problem import Problem


def importance_reference(problem: Problem, *, matmul_dtype: torch.dtype | None = None) -> Tensor:
    """Score (heads, slots_k) in float32, float64 for float64 input.

    ``score[h, j] = sum_i weight[h, i] * exp(s_hij - lse[h, i])`` over the queries i that see slot j. ``matmul_dtype``
    is the dtype of the product, None for float32 or wider: the query's own gives plain PyTorch's error.
    """
    p = problem
    wide = torch.promote_types(p.query.dtype, torch.float32)
    narrow = matmul_dtype or wide
    heads, groups = p.query.shape[1], p.query.shape[1] // p.key.shape[1]
    rows_q = slot_rows(p.query, p.cu_seqlens_q, p.seqused_q, p.query_index)
    rows_k = slot_rows(p.key, p.cu_seqlens_k, p.seqused_k, p.key_index)
    weight = p.lse.new_ones(p.query.shape[0]) if p.row_weight is None else p.row_weight

    score = p.query.new_zeros(heads, p.slots_k, dtype=wide)
    for first, mine, theirs in zip(p.cu_seqlens_k.tolist(), rows_q, rows_k, strict=False):
        runs = visible_runs(mine, theirs.shape[0], p.kv_range)
        for rows, (_, begin, end) in zip(mine.split([n for n, _, _ in runs]), runs, strict=True):
            if begin >= end:
                continue
            rows = rows[(p.lse[:, rows] != -torch.inf).any(0)]
            seen = theirs[begin:end]
            q = p.query[rows].to(narrow).transpose(0, 1).unflatten(0, (-1, groups))  # (kv_heads, groups, n, head_dim)
            k = p.key[seen].to(narrow).transpose(0, 1)[:, None]  # (kv_heads, 1, m, head_dim)
            s = (q @ k.mT).flatten(0, 1).to(wide) * p.scale  # (heads, n, m)
            if p.softcap:
                s = p.softcap * torch.tanh(s / p.softcap)
            if p.key_bias is not None:
                column = p.key_bias[seen].to(wide)
                s = s + (column if column.ndim == 1 else column.T[:, None, :])
            lse = p.lse[:, rows, None]
            blank = lse == -torch.inf
            weights = torch.where(blank, 0.0, torch.exp(s - torch.where(blank, 0.0, lse)))
            received = (weight[..., rows, None] * weights).sum(1)  # (heads, m)
            slots = torch.arange(first + begin, first + end, device=score.device)
            score = score.index_add(1, slots, received)
    # A sum of nothing: inputs that nobody sees get zeros for a gradient.
    return score + (p.query[:0].sum() + p.key[:0].sum() + p.lse[:, :0].sum()).to(wide)
