"""Cross-attention over image tokens that are spread over ranks, merged by log-sum-exp."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from fastxattn.distributed.agreement import Agreement, Value, agree, announced, plain
from fastxattn.distributed.collectives import Group, SumBackward, SumForward, guarded, world_size
from fastxattn.ops.arguments import default_scale
from fastxattn.ops.attention import varlen_cross_attention
from fastxattn.ops.attention.backends import prepare
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime import env


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """Exact cross-attention in which each rank holds a part of every sample's image tokens.

    Every rank holds all queries and gets the whole output; each attends to its own keys, and the parts are merged
    with the weights ``exp(lse_rank - lse_total)``. A rank may hold no token of a sample, or none at all.

    Args:
        query: (total_q, heads, head_dim), the same on every rank.
        key: (this rank's tokens, kv_heads, head_dim).
        value: (this rank's tokens, kv_heads, value_dim).
        cu_seqlens_q: (batch + 1,) int32, the same on every rank.
        cu_seqlens_k: (batch + 1,) int32 offsets of this rank's tokens.
        scale: as in :func:`fastxattn.varlen_cross_attention`.
        group: process group; None for the default one.
        backend: backend of the local attention.

    Returns:
        (total_q, heads, value_dim) on every rank. Gradients: every rank is expected to go on with the output alike,
        so the query's gradient is the whole one on every rank, and keys and values get theirs where they live.

    Raises:
        TypeError, ValueError: an argument breaks a rule of :func:`fastxattn.varlen_cross_attention`.
        ValueError: ranks disagree on the shape or dtype of the query, on the batch, on ``scale`` or on whether autograd
            records; checked on CPUs, and on GPUs with ``FASTXATTN_VALIDATE=1`` (it waits for the device).
        RuntimeError: another rank left or died; raised within the process group's timeout.
    """
    if world_size(group) == 1:
        return varlen_cross_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale=scale, backend=backend)
    agreement = _agreement(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, group)
    query = agreement.joined(query, agreement.wanted[0])
    query, key, value = SumBackward.apply(group, agreement.wanted[0], query, key, value)
    out, lse = varlen_cross_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, scale=scale, return_lse=True, backend=backend
    )
    highest = lse.detach().clone()
    guarded("merging attention", group, lambda: dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group))
    seen = highest > -torch.inf
    # Rows that no rank sees anything for have weight 0 and output 0; their lse of -inf must not reach a subtraction.
    here = lse > -torch.inf
    weight = torch.where(here, torch.exp(torch.where(here, lse, 0.0) - torch.where(seen, highest, 0.0)), 0.0)
    weight = weight.transpose(0, 1).unsqueeze(-1)
    parts = torch.cat([out.to(weight.dtype) * weight, weight], -1)
    total = SumForward.apply(agreement.joined(parts), group)
    number = total[..., -1:]
    merged: Tensor = total[..., :-1] / torch.where(number > 0, number, 1.0)
    return merged.to(out.dtype)


def _agreement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None,
    group: Group,
) -> Agreement:
    """Check the arguments and compare them with the other ranks'; on GPUs only when asked to."""
    compare = env.validate_on_gpu or not isinstance(query, Tensor) or query.is_cpu
    with announced("context_parallel_attention", query, group) if compare else nullcontext():
        for name, x in (("query", query), ("key", key), ("value", value)):
            plain(name, x)
        p = prepare(
            Problem(
                query=query,
                key=key,
                value=value,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                scale=default_scale(query, scale),
            )
        )
        if not compare:
            recording = torch.is_grad_enabled()
            return Agreement([], tuple(recording and t.requires_grad for t in (query, key, value)))
    tokens, heads, head_dim = p.query.shape
    same: dict[str, Value] = {
        "the tokens of query": tokens,
        "the heads of query": heads,
        "head_dim": head_dim,
        "the dtype of query": p.query.dtype,
        "the heads of key": p.key.shape[1],
        "value_dim": p.value.shape[2],
        "the batch": p.cu_seqlens_q.shape[0] - 1,
        "scale": float(p.scale),
    }
    return agree("context_parallel_attention", p.key.shape[0], (query, key, value), same, query.device, group)
