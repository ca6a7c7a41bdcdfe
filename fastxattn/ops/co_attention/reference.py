"""The oracle: one matrix of scores, a softmax along each axis. Eager torch, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention.dropout import keep_mask


def co_attention_reference(
    query_a: Tensor,
    query_b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    cu_seqlens_a: Tensor,
    cu_seqlens_b: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_a, out_b); arguments as in :func:`fastxattn.co_attention`, ``dropout_seed`` (2,)."""
    out_a = query_a.new_zeros(query_a.shape[0], query_a.shape[1], value_b.shape[2])
    out_b = query_b.new_zeros(query_b.shape[0], query_b.shape[1], value_a.shape[2])
    ends_a, ends_b = cu_seqlens_a.tolist(), cu_seqlens_b.tolist()
    for a0, a1, b0, b1 in zip(ends_a, ends_a[1:], ends_b, ends_b[1:], strict=False):
        if a0 == a1 or b0 == b1:
            continue
        scores = scale * torch.einsum("ihd,jhd->hij", query_a[a0:a1], query_b[b0:b1])
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows = scores if bias_b is None else scores + _spread(bias_b[b0:b1])[:, None, :]
        columns = scores if bias_a is None else scores + _spread(bias_a[a0:a1])[:, :, None]
        reads_b, reads_a = rows.softmax(2), columns.softmax(1)
        if dropout_p and dropout_seed is not None:
            i, j = (torch.arange(*ends, device=query_a.device) for ends in ((a0, a1), (b0, b1)))
            heads = query_a.shape[1]
            reads_b = reads_b * keep_mask(i, j - b0, heads, dropout_p, dropout_seed[:1]) / (1 - dropout_p)
            reads_a = reads_a * keep_mask(j, i - a0, heads, dropout_p, dropout_seed[1:]).mT / (1 - dropout_p)
        one = torch.einsum("hij,jhd->ihd", reads_b.to(value_b.dtype), value_b[b0:b1])
        other = torch.einsum("hij,ihd->jhd", reads_a.to(value_a.dtype), value_a[a0:a1])
        out_a = out_a.index_copy(0, torch.arange(a0, a1, device=out_a.device), one)
        out_b = out_b.index_copy(0, torch.arange(b0, b1, device=out_b.device), other)
    return out_a, out_b


def _spread(bias: Tensor) -> Tensor:
    """(heads|1, tokens)."""
    return bias[None] if bias.ndim == 1 else bias.T
