"""Public function: few queries over raw features, the key and value projections absorbed."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastxattn.ops.absorbed_attention.backends import run
from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.arguments import default_scale


@overload
def absorbed_attention(
    query: Tensor,
    context: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
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
    scale: float | None = None,
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
    scale: float | None = None,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention with queries as wide as the features, which are key and value of every head.

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
        max_seqlen_q: ignored; accepted so that call sites match attention's.
        max_seqlen_k: ignored.
        scale: of the products; 1 / sqrt(width) when None. Absorbed queries usually need 1 / sqrt(head_dim) of the
            heads that they came from.
        kv_range: (total_q, 2) int32: query i sees rows [start, end) of its sequence's context.
        key_bias: (total_k,) or (total_k, heads) float32, by context row, added to the scores; differentiable.
        key_index: (kept,) int32, rows of ``context`` that the sequences consist of; others are not read.
        return_lse: also return the log-sum-exp of the scores, (heads, total_q) float32, differentiable.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        ``out`` (total_q, heads, width); 0 where a query sees nothing (lse -inf). With ``return_lse`` also lse.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: ``backend`` cannot run the problem; the message says why.

    Example:
        >>> absorbed = torch.einsum("qhd,hde->qhe", q, w_k)  # queries as wide as the features
        >>> mixed = absorbed_attention(absorbed, features, cu_q, cu_k, scale=q.shape[2] ** -0.5)
        >>> out = torch.einsum("qhe,hde->qhd", mixed, w_v)
    """
    problem = Problem(
        query=query,
        context=context,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        kv_range=kv_range,
        key_bias=key_bias,
        scale=default_scale(query, scale),
    )
    out, lse = run(problem, key_index, backend)
    return (out, lse) if return_lse else out
