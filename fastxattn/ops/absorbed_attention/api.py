"""Context attention: few queries over raw features, the key and value projections absorbed."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastxattn.ops.absorbed_attention import cpu
from fastxattn.ops.absorbed_attention.autograd import FORWARD, AbsorbedAttention
from fastxattn.ops.absorbed_attention.checks import check_arguments
from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.absorbed_attention.reference import absorbed_attention_reference
from fastxattn.runtime.backend import Backend, Explanation, explain, resolve

BACKENDS = (Backend("cpu", cpu.supports), Backend("reference", lambda problem: None))


@overload
def absorbed_attention(
    query: Tensor,
    context: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float = 1.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def absorbed_attention(
    query: Tensor,
    context: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float = 1.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def absorbed_attention(
    query: Tensor,
    context: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float = 1.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with queries as wide as the features; the features are key and value of every head.

    For query i, head h and the context rows k that i sees::

        s_ihk = scale * query_ih . context_k + key_bias_k
        out_ih = sum_k softmax_k(s_ihk) * context_k

    With query_ih = W_k,h^T q_ih this is attention with keys ``context W_k^T`` and values ``context``; multiplying
    ``out`` by W_v,h gives the values their projection. The features are never projected.

    Args:
        query: (total_q, heads, width), float32, bfloat16, float16 or float64.
        context: (total_k, width), of the query's dtype.
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries start.
        cu_seqlens_k: (batch + 1,) int32, where each sequence's context starts (in ``key_index``, when given).
        max_seqlen_q: a bound on the queries per sequence; a hint.
        max_seqlen_k: a bound on the context rows per sequence; a hint.
        scale: of the products; absorbed queries usually want their old head_dim ** -0.5.
        kv_range: (total_q, 2) int32: query i sees places [start, end) of its sequence's context.
        key_bias: (total_k,) or (total_k, heads) float32, by context row, added to the scores; differentiable.
        key_index: (kept,) int32, rows of ``context`` that the sequences consist of; others are not read.
        return_lse: also return the log-sum-exp of the scores, (heads, total_q) float32, differentiable.
        backend: "auto", "cpu" or "reference".

    Returns:
        ``out`` (total_q, heads, width); 0 where a query sees nothing (lse -inf). With ``return_lse`` also lse.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: ``backend`` cannot run the problem; the message says why.
    """
    check_arguments(query, context, cu_seqlens_q, cu_seqlens_k, kv_range, key_bias, key_index, scale)
    chosen = resolve("absorbed_attention", BACKENDS, _problem(query, key_bias), backend)
    if key_index is not None:
        # Every row is used by all heads and queries of its sequence: gathering costs little beside that.
        context = context.index_select(0, key_index)
        key_bias = None if key_bias is None else key_bias.index_select(0, key_index)
    if chosen == "reference":
        out, lse = absorbed_attention_reference(query, context, cu_seqlens_q, cu_seqlens_k, kv_range, key_bias, scale)
    else:
        query = query if query.stride(2) == 1 else query.contiguous()
        problem = (
            query,
            context.contiguous(),
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            None if kv_range is None else kv_range.contiguous(),
            None if key_bias is None else key_bias.float().contiguous(),
            float(scale),
        )
        # The operator has its own derivative, and Dynamo keeps it whole.
        compiling = torch.compiler.is_compiling()
        out, lse, _ = FORWARD[chosen](*problem) if compiling else AbsorbedAttention.apply(chosen, *problem)
    return (out, lse) if return_lse else out


def explain_absorbed_attention(
    query: Tensor, context: Tensor, *, key_bias: Tensor | None = None, backend: str = "auto"
) -> Explanation:
    """Which backend :func:`absorbed_attention` would use for these tensors, and why."""
    return explain("absorbed_attention", BACKENDS, _problem(query, key_bias), backend)


def _problem(query: Tensor, key_bias: Tensor | None) -> Problem:
    return Problem(
        device=query.device.type,
        dtype=query.dtype,
        heads=query.shape[1],
        width=query.shape[2],
        bias_per_head=key_bias is not None and key_bias.ndim == 2,
        grad=torch.is_grad_enabled() and query.requires_grad,
    )
