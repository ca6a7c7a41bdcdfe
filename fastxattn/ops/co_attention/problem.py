"""The co-attention problem as every backend receives it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastxattn.ops.attention.problem import Problem


class CoAttentionProblem(NamedTuple):
    """Arguments of one call, in the order of the operator schema; see :mod:`fastxattn.ops.co_attention.schema`."""

    query_a: Tensor
    query_b: Tensor
    value_a: Tensor
    value_b: Tensor
    cu_seqlens_a: Tensor
    cu_seqlens_b: Tensor
    bias_a: Tensor | None = None
    bias_b: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def direction(self, reader: int) -> Problem:
        """The attention problem of one direction: side a reads b (0), or b reads a (1)."""
        p, seed = self, self.dropout_seed
        mine = seed[reader : reader + 1] if isinstance(seed, Tensor) else seed  # what is wrong is named by the checks
        a, b = (p.query_a, p.value_a, p.cu_seqlens_a, p.bias_a), (p.query_b, p.value_b, p.cu_seqlens_b, p.bias_b)
        reading, read = (a, b) if reader == 0 else (b, a)
        return Problem(
            reading[0], read[0], read[1], reading[2], read[2], key_bias=read[3], scale=p.scale, softcap=p.softcap,
            dropout_p=p.dropout_p, dropout_seed=mine,
        )  # fmt: skip
