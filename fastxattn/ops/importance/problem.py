"""The key-importance problem as every backend receives it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastxattn.ops.attention.problem import Problem


class ImportanceProblem(NamedTuple):
    """Arguments of one call, in the order of the operator schema; see :mod:`fastxattn.ops.attention.schema`.

    ``lse`` is (heads, rows_q) float32 and ``row_weight`` (rows_q,) or (heads, rows_q) float32 or None, both by query
    row.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    kv_range: Tensor | None = None
    key_bias: Tensor | None = None
    row_weight: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def slots_k(self) -> int:
        """Key slots: entries of ``key_index``, or keys."""
        return self.key.shape[0] if self.key_index is None else self.key_index.shape[0]

    def attention(self, value: Tensor | None = None) -> Problem:
        """The attention problem with the same scores."""
        return Problem(
            self.query, self.key, self.key if value is None else value, self.cu_seqlens_q, self.cu_seqlens_k,
            self.seqused_q, self.seqused_k, self.query_index, self.key_index, self.kv_range, self.key_bias, None,
            self.scale, self.softcap,
        )  # fmt: skip
