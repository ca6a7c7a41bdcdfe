"""Reference implementation: one matrix of scores, a softmax along each axis. Eager torch, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention.dropout import keep_mask
from fastxattn.ops.co_attention.problem import Problem


def co_attention_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out_a, out_b)."""
    p = problem
    heads = p.query_a.shape[1]
    out_a = p.query_a.new_zeros(p.query_a.shape[0], heads, p.value_b.shape[2])
    out_b = p.query_b.new_zeros(p.query_b.shape[0], heads, p.value_a.shape[2])
    ends_a, ends_b = p.cu_seqlens_a.tolist(), p.cu_seqlens_b.tolist()
    for a0, a1, b0, b1 in zip(ends_a, ends_a[1:], ends_b, ends_b[1:], strict=False):
        if a0 == a1 or b0 == b1:
            continue
        scores = p.scale * torch.einsum("ihd,jhd->hij", p.query_a[a0:a1], p.query_b[b0:b1])
        if p.softcap:
            scores = p.softcap * torch.tanh(scores / p.softcap)
        rows = scores if p.key_bias_b is None else scores + _spread(p.key_bias_b[b0:b1])[:, None, :]
        columns = scores if p.key_bias_a is None else scores + _spread(p.key_bias_a[a0:a1])[:, :, None]
        reads_b, reads_a = rows.softmax(2), columns.softmax(1)
        if p.dropout_p and p.dropout_seed is not None:
            i, j = (torch.arange(*ends, device=out_a.device) for ends in ((a0, a1), (b0, b1)))
            keep = 1 - p.dropout_p
            reads_b = reads_b * keep_mask(i, j - b0, heads, p.dropout_p, p.dropout_seed[:1]) / keep
            reads_a = reads_a * keep_mask(j, i - a0, heads, p.dropout_p, p.dropout_seed[1:]).mT / keep
        one = torch.einsum("hij,jhd->ihd", reads_b.to(out_a.dtype), p.value_b[b0:b1])
        other = torch.einsum("hij,ihd->jhd", reads_a.to(out_b.dtype), p.value_a[a0:a1])
        out_a = out_a.index_copy(0, torch.arange(a0, a1, device=out_a.device), one)
        out_b = out_b.index_copy(0, torch.arange(b0, b1, device=out_b.device), other)
    return out_a, out_b


def _spread(bias: Tensor) -> Tensor:
    """(heads|1, tokens)."""
    return bias[None] if bias.ndim == 1 else bias.T
