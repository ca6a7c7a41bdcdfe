"""Operator schemas of key importance: one forward per compiled backend; the gradient is made of attention operators.

``score`` is (heads, slots_k) float32, 0 at slots that are out of use; slots are entries of ``key_index``, or key rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.importance.checks import check_shapes
from fastxattn.ops.importance.problem import ImportanceProblem
from fastxattn.runtime.operators import define

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, Tensor? query_index, Tensor? key_index, Tensor? kv_range, Tensor? key_bias, "
    "Tensor? row_weight, float scale, float softcap) -> Tensor"
)


def _fake(*arguments: Any) -> Tensor:
    problem = ImportanceProblem(*arguments)
    check_shapes(problem)
    return problem.query.new_empty(problem.query.shape[1], problem.slots_k, dtype=torch.float32)


for _backend in ("cpu", "triton"):
    define(f"importance_{_backend}", _SCHEMA, _fake)
