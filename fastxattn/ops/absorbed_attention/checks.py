"""Validation: a message names the argument, the rule and the value got, before any memory is touched."""

from __future__ import annotations

import torch

from fastxattn.ops.attention.checks import check_number
from fastxattn.ops.offsets import check_dense, check_offsets, readable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(
    query: torch.Tensor,
    context: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    kv_range: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    key_index: torch.Tensor | None,
    scale: float,
) -> None:
    """Refuse what does not fit together; offsets' and indices' contents are looked at where that costs no wait."""
    check_number("scale", scale)
    for name, t in (("query", query), ("context", context)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        check_dense(name, t)
    if query.ndim != 3:
        raise ValueError(f"query must be (total_q, heads, width); got shape {tuple(query.shape)}")
    if context.ndim != 2:
        raise ValueError(f"context must be (total_k, width); got shape {tuple(context.shape)}")
    if query.shape[2] != context.shape[1]:
        raise ValueError(f"query must be as wide as context, {context.shape[1]}; got {query.shape[2]}")
    if query.shape[1] < 1 or query.shape[2] < 1:
        raise ValueError(f"query must have at least one head and one feature; got shape {tuple(query.shape)}")
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64; got {query.dtype}")
    if context.dtype != query.dtype:
        raise TypeError(f"context must have query's dtype {query.dtype}; got {context.dtype}")
    slots = context.shape[0] if key_index is None else key_index.shape[0]
    for name, offsets, rows in (("cu_seqlens_q", cu_seqlens_q, query.shape[0]), ("cu_seqlens_k", cu_seqlens_k, slots)):
        check_offsets(name, offsets, rows)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        wanted, got = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
        raise ValueError(f"cu_seqlens_k must have as many entries as cu_seqlens_q, {wanted}; got {got}")
    for name, given in (("kv_range", kv_range), ("key_bias", key_bias), ("key_index", key_index)):
        if given is not None and not isinstance(given, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")
    if kv_range is not None:
        if kv_range.dtype != torch.int32:
            raise TypeError(f"kv_range must be int32; got {kv_range.dtype}")
        if kv_range.shape != (query.shape[0], 2):
            raise ValueError(f"kv_range must have shape {(query.shape[0], 2)}; got {tuple(kv_range.shape)}")
    if key_bias is not None and key_bias.shape not in ((context.shape[0],), (context.shape[0], query.shape[1])):
        rows, heads = context.shape[0], query.shape[1]
        raise ValueError(f"key_bias must have shape ({rows},) or ({rows}, {heads}); got {tuple(key_bias.shape)}")
    if key_index is not None:
        if key_index.dtype != torch.int32 or key_index.ndim != 1:
            raise TypeError(f"key_index must be int32 of shape (kept,); got {key_index.dtype} {tuple(key_index.shape)}")
        if readable(key_index) and key_index.numel():
            low, high = int(key_index.min()), int(key_index.max())
            if low < 0 or high >= context.shape[0]:
                raise ValueError(f"key_index must lie in [0, {context.shape[0]}); got {low if low < 0 else high}")
    others = (context, cu_seqlens_q, cu_seqlens_k, kv_range, key_bias, key_index)
    for tensor in others:
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"all arguments must be on query's device {query.device}; got one on {tensor.device}")
