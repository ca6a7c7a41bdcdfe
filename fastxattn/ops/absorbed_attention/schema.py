"""Operator schemas of context attention: forward and backward of the compiled backend, and their fakes.

``query`` (rows_q, heads, width), ``context`` (rows_k, width), ``cu_seqlens_q/k`` (batch + 1,) int32, ``kv_range``
(rows_q, 2) int32 or None, ``key_bias`` (rows_k,) float32 or None. Forward returns ``out`` like ``query``, ``lse``
(heads, rows_q) float32, and ``softmax`` (2, heads, rows_q) float32, what the backward needs to find the weights
again: the largest score of each row, and the sum of exp(score - largest). Backward returns gradients for query,
context and key_bias; those not asked for in ``needs`` (a bit mask, see :data:`NEEDS`) hold nothing of meaning.
"""

from __future__ import annotations

import torch

from fastxattn.runtime.operators import define

NEEDS = {"query": 1, "context": 2, "key_bias": 4}

_PROBLEM = (
    "Tensor query, Tensor context, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? kv_range, Tensor? key_bias, "
    "float scale"
)

_FORWARD = f"({_PROBLEM}) -> (Tensor out, Tensor lse, Tensor softmax)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor softmax, {_PROBLEM}, int needs) -> "
    "(Tensor grad_query, Tensor grad_context, Tensor grad_key_bias)"
)


def _forward_fake(
    query: torch.Tensor,
    context: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    kv_range: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, heads, width = query.shape
    lse = query.new_empty(heads, rows, dtype=torch.float32)
    return query.new_empty(rows, heads, width), lse, lse.new_empty(2, heads, rows)


def _backward_fake(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax: torch.Tensor,
    query: torch.Tensor,
    context: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    kv_range: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    scale: float,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = key_bias is not None and bool(needs & 4)
    by_key = bool(needs & 2) or bias
    return (
        query.new_empty(query.shape if needs & 1 else (0,)),
        context.new_empty(context.shape if by_key else (0,)),
        lse.new_empty(context.shape[:1] if bias else (0,)),
    )


define("absorbed_attention_cpu", _FORWARD, _forward_fake)
define("absorbed_attention_backward_cpu", _BACKWARD, _backward_fake)
