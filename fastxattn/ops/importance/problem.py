"""Arguments of key importance."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.arguments import Arguments, differentiable, number, problem
from fastxattn.ops.attention.problem import Problem as AttentionProblem

OWN = ("lse", "row_weight")
"""Fields that attention has not; all others mean what they mean there."""


@problem
class Problem(Arguments):
    """One call: attention's arguments without values and dropout, and the statistics of its rows."""

    query: Tensor = differentiable()  # (rows_q, heads, head_dim)
    key: Tensor = differentiable()  # (rows_k, kv_heads, head_dim)
    lse: Tensor = differentiable()  # (heads, rows_q) float32, of the forward pass
    cu_seqlens_q: Tensor  # (batch + 1,) int32
    cu_seqlens_k: Tensor  # (batch + 1,) int32
    seqused_q: Tensor | None = None  # (batch,) int32
    seqused_k: Tensor | None = None  # (batch,) int32
    query_index: Tensor | None = None  # (slots_q,) int32
    key_index: Tensor | None = None  # (slots_k,) int32
    kv_range: Tensor | None = None  # (rows_q, 2) int32
    key_bias: Tensor | None = differentiable(default=None)  # (rows_k,) or (rows_k, heads) float32
    row_weight: Tensor | None = differentiable(default=None)  # (rows_q,) or (heads, rows_q) float32
    scale: float = number(default=1.0)
    softcap: float = number(low=0.0, default=0.0)

    @property
    def slots_k(self) -> int:
        """Key slots: entries of ``key_index``, or keys."""
        return self.key.shape[0] if self.key_index is None else self.key_index.shape[0]

    def attention(self, value: Tensor | None = None) -> AttentionProblem:
        """The attention problem with the same scores."""
        shared = {name: getattr(self, name) for name in self.names if name not in OWN}
        return AttentionProblem(value=self.key if value is None else value, **shared)
