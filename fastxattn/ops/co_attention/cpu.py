"""The C++ kernel for CPUs: one pass over the scores, forward and backward. It supports what attention's does."""

from __future__ import annotations

from fastxattn.ops.co_attention.problem import CoAttentionProblem

FEW_TOKENS = 24


def pays(problem: CoAttentionProblem) -> bool:
    """Whether one pass is faster than two calls: measured to be so unless one side has few tokens on average."""
    batch = max(problem.cu_seqlens_a.shape[0] - 1, 1)
    return min(problem.query_a.shape[0], problem.query_b.shape[0]) >= FEW_TOKENS * batch
