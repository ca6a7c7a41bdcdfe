"""Operators of retrieval: the best ``k`` corpus rows of each query, scores descending.

They return scores (Q, k) float32 and row indices (Q, k) int64; -inf and -1 where the corpus has fewer than k rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.retrieval.problem import Problem
from fastxattn.runtime.operators import define


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    p = Problem.of(arguments)
    shape = (p.queries.shape[0], p.k)
    return p.queries.new_empty(shape, dtype=torch.float32), p.queries.new_empty(shape, dtype=torch.int64)


for _backend in ("cpu", "triton"):
    define(f"topk_similarity_{_backend}", f"({Problem.schema()}) -> (Tensor scores, Tensor indices)", _fake)
