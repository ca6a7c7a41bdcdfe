"""Reference implementation: attention whose single key and value head is the context, shared by all query heads."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.attention.problem import Problem as AttentionProblem
from fastxattn.ops.attention.reference import attention_reference


def absorbed_attention_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Out (rows_q, heads, width) in the query's dtype and lse (heads, rows_q)."""
    shared = {name: getattr(problem, name) for name in problem.names if name != "context"}
    context = problem.context.unsqueeze(1)
    return attention_reference(AttentionProblem(key=context, value=context, **shared))
