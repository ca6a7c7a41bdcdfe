"""The public function: how much attention every key receives."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastxattn.ops.importance.checks import check_reduction
from fastxattn.ops.importance.dispatch import count_queries, score_of
from fastxattn.ops.importance.problem import ImportanceProblem


def key_importance(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    kv_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduce: Literal["mean", "sum", "max", "none"] = "mean",
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Attention received by every key: column sums of the attention map, which never exists.

    For head h, key j, and the queries i of its sequence that see it::

        score_hj = sum_i row_weight_hi * exp(s_hij - lse_hi)        s as in varlen_cross_attention

    reduced over heads. One pass over the keys, exact, bitwise repeatable.

    Args:
        query: (total_q, heads, head_dim) float32, bfloat16, float16 or float64.
        key: (total_k, kv_heads, head_dim); kv_heads divides heads.
        lse: (heads, total_q) float32, as ``varlen_cross_attention(..., return_lse=True)`` gave it. It may come from a
            larger set of keys than those asked about here.
        cu_seqlens_q: (batch + 1,) int32, offsets of the queries, or of ``query_index`` when given.
        cu_seqlens_k: (batch + 1,) int32, offsets of the keys, or of ``key_index`` when given.
        max_seqlen_q: taken so that call sites match attention's; no backend needs it.
        max_seqlen_k: the same.
        scale: multiplies the scores; 1 / sqrt(head_dim) when None. This and the next five are those of the forward.
        softcap: soft limit on scores; 0 is off.
        kv_range: (total_q, 2) int32; query i sees keys [start, end) of its own sequence.
        key_bias: (total_k,) or (total_k, heads) float32.
        query_index: (chosen,) int32; only these rows of ``query`` count, each at most once. The class token's row, or
            the last row of a prompt, makes a probe that costs one row instead of all of them.
        key_index: (kept,) int32; the keys are these rows of ``key``.
        row_weight: (total_q,) or (heads, total_q) float32; 1 when None. Weights may be negative.
        reduce: over heads: ``"mean"``, ``"sum"``, ``"max"`` or ``"none"``.
        normalize: divide by the number of queries that see the key (at least 1), so that keys which few may look at
            are not underrated.
        backend: ``"auto"``, or a name that is used or refused.

    Returns:
        (total_k,) float32, or (heads, total_k) with ``reduce="none"``; with ``key_index`` one score per entry of it.
        Keys that belong to no sequence or that no query sees get 0. Differentiable in query, key, lse, key_bias and
        row_weight.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, offset, index or number is wrong, or there is no such reduction or backend.
        RuntimeError: the backend asked for cannot run this problem; the message says why.

    Example:
        >>> out, lse = varlen_cross_attention(q, k, v, cu_q, cu_k, return_lse=True)
        >>> score = key_importance(q, k, lse, cu_q, cu_k)

    Column sums as a measure of tokens: Chen et al., FastV (2024); Zhang et al., H2O (2023); Arif et al., HiRED (2024).
    """
    check_reduction(reduce)
    problem = ImportanceProblem(
        query, key, lse, cu_seqlens_q, cu_seqlens_k, None, None, query_index, key_index, kv_range, key_bias,
        row_weight, 1.0, softcap,
    )  # fmt: skip
    score = score_of(problem, scale, backend)
    if normalize:
        score = score / count_queries(problem).clamp(min=1)
    if reduce == "mean":
        return score.mean(0)
    if reduce == "sum":
        return score.sum(0)
    return score.amax(0) if reduce == "max" else score
