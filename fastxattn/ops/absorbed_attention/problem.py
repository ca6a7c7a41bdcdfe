"""Arguments of absorbed attention."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.arguments import Arguments, differentiable, number, problem


@problem
class Problem(Arguments):
    """One call; the rows that a ``key_index`` selects have been gathered."""

    query: Tensor = differentiable()  # (rows_q, heads, width)
    context: Tensor = differentiable()  # (rows_k, width)
    cu_seqlens_q: Tensor  # (batch + 1,) int32
    cu_seqlens_k: Tensor  # (batch + 1,) int32
    kv_range: Tensor | None = None  # (rows_q, 2) int32
    key_bias: Tensor | None = differentiable(default=None)  # (rows_k,) or (rows_k, heads) float32
    scale: float = number(default=1.0)
