"""The oracle: attention written to be read. Eager torch, any floating dtype, differentiated by autograd.

For every sequence b, query slot i and head h, over the key slots j that i sees::

    s_ij = softcap * tanh(scale * q_i.k_j / softcap) + key_bias_j + bias_ij     (no tanh when softcap is 0)
    lse_i = log sum_j exp(s_ij)
    out_i = sum_j exp(s_ij - lse_i) * keep_ij / (1 - p) * v_j

A query that sees no key gives out 0, lse -inf and zero gradients. Queries are taken in runs that see the same keys,
and a run touches only those keys: what nobody sees, NaN included, cannot reach a result or a gradient.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastxattn.ops.attention.dropout import keep_mask
from fastxattn.ops.attention.problem import Problem


def attention_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Out (rows_q, heads, value_dim) in the query's dtype and lse (heads, rows_q).

    Everything is computed in float32, in float64 for float64 input; so is lse.
    """
    p, dtype = problem, problem.query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (t.to(wide) for t in (p.query, p.key, p.value))
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    rows_q = slot_rows(query, p.cu_seqlens_q, p.seqused_q, p.query_index)
    rows_k = slot_rows(key, p.cu_seqlens_k, p.seqused_k, p.key_index)
    starts_q, starts_k = p.cu_seqlens_q.tolist(), p.cu_seqlens_k.tolist()

    done, outs, lses = [], [], []
    for b, (mine, theirs) in enumerate(zip(rows_q, rows_k, strict=True)):
        runs = visible_runs(mine, theirs.shape[0], p.kv_range)
        sizes = [n for n, _, _ in runs]
        queries = query[mine].transpose(0, 1).unflatten(0, (-1, groups)).split(sizes, dim=2)
        keys, values = key[theirs].transpose(0, 1), value[theirs].transpose(0, 1)
        # q (kv_heads, groups, n, head_dim), k (kv_heads, 1, m, head_dim), v (kv_heads, 1, m, value_dim)
        for q, rows, (_, begin, end) in zip(queries, mine.split(sizes), runs, strict=True):
            if begin >= end:
                continue
            seen, k, v = theirs[begin:end], keys[:, None, begin:end], values[:, None, begin:end]
            scores = (q @ k.mT).flatten(0, 1) * p.scale  # (heads, n, m)
            if p.softcap:
                scores = p.softcap * torch.tanh(scores / p.softcap)
            if p.key_bias is not None:
                column = p.key_bias[seen].to(wide)
                scores = scores + (column if column.ndim == 1 else column.T[:, None, :])
            if p.bias is not None:
                scores = scores + _bias_of(p.bias, b, rows - starts_q[b], seen - starts_k[b]).to(wide)
            weights, lse = _softmax(scores)
            if p.dropout_p:
                assert p.dropout_seed is not None
                slots = torch.arange(begin, end, device=query.device)
                weights = weights * keep_mask(rows, slots, heads, p.dropout_p, p.dropout_seed) / (1 - p.dropout_p)
            out = weights.unflatten(0, (-1, groups)) @ v  # (kv_heads, groups, n, value_dim)
            done.append(rows)
            outs.append(out.flatten(0, 1).transpose(0, 1))
            lses.append(lse)

    # Sums of nothing: they tie the results to every input, so that an input nobody sees gets zeros for a gradient.
    tie = query.new_zeros(())
    for t in p.differentiated():
        tie = tie if t is None else tie + t.flatten()[:0].sum().to(wide)
    out = query.new_zeros(query.shape[0], heads, value.shape[2]) + tie
    lse = query.new_full((heads, query.shape[0]), -torch.inf) + tie
    if done:
        out = out.index_copy(0, torch.cat(done), torch.cat(outs))
        lse = lse.index_copy(1, torch.cat(done), torch.cat(lses, dim=1))
    return out.to(dtype), lse


def slot_rows(tokens: Tensor, offsets: Tensor, used: Tensor | None, index: Tensor | None) -> list[Tensor]:
    """For each sequence, the rows of ``tokens`` that its slots stand for, int64."""
    rows = torch.arange(tokens.shape[0], device=tokens.device) if index is None else index.long()
    bounds = offsets.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)] if used is None else used.tolist()
    return [rows[start : start + length] for start, length in zip(bounds, lengths, strict=False)]


def visible_runs(rows: Tensor, keys: int, kv_range: Tensor | None) -> list[tuple[int, int, int]]:
    """A sequence's query rows as runs of n neighbours that see the same key slots [begin, end)."""
    if kv_range is None:
        return [(rows.shape[0], 0, keys)]
    ranges, counts = torch.unique_consecutive(kv_range[rows], dim=0, return_counts=True)
    bounds = zip(counts.tolist(), ranges.tolist(), strict=True)
    return [(count, max(begin, 0), min(end, keys)) for count, (begin, end) in bounds]


def _bias_of(bias: Tensor, b: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The (heads|1, n|1, m|1) part of a padded bias for these places in sequence ``b``."""
    part = bias[b if bias.shape[0] > 1 else 0]
    part = part if part.shape[1] == 1 else part[:, rows]
    return part if part.shape[2] == 1 else part[:, :, columns]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last axis; a row of -inf gives zeros, -inf and zero gradients."""
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, total.log() + top)
    return weights / total, lse.squeeze(-1)
