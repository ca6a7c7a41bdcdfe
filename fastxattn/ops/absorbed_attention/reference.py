"""The oracle: attention whose single key and value head is the context itself, shared by all heads of the query."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.attention.reference import attention_reference


def absorbed_attention_reference(
    query: Tensor,
    context: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Out (rows_q, heads, width) in the query's dtype and lse (heads, rows_q); arguments as in ``schema``."""
    shared = context.unsqueeze(1)
    return attention_reference(
        query,
        shared,
        shared,
        cu_seqlens_q,
        cu_seqlens_k,
        kv_range=kv_range,
        key_bias=key_bias,
        scale=scale,
    )
