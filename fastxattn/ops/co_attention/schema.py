"""Operator schemas of co-attention: one forward and one backward per compiled backend, and their fakes.

Arguments as in :func:`fastxattn.co_attention`; ``dropout_seed`` is (2,) int64, one for each reader, or None.
Forward returns ``out_a`` (tokens_a, heads, value_dim_b), ``out_b`` (tokens_b, heads, value_dim_a) and the log-sum-exps
``lse_a`` and ``lse_b`` (heads, tokens) float32. Backward returns the gradients named in :data:`NEEDS`, in that order;
those not asked for are empty, and those of the biases are (heads, tokens) float32 whatever shape the bias has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention import checks
from fastxattn.ops.co_attention.problem import CoAttentionProblem
from fastxattn.runtime.operators import define

NEEDS = {"query_a": 1, "query_b": 2, "value_a": 4, "value_b": 8, "bias_a": 16, "bias_b": 32}

_PROBLEM = (
    "Tensor query_a, Tensor query_b, Tensor value_a, Tensor value_b, Tensor cu_seqlens_a, Tensor cu_seqlens_b, "
    "Tensor? bias_a, Tensor? bias_b, float scale, float softcap, float dropout_p, Tensor? dropout_seed"
)
_FORWARD = f"({_PROBLEM}) -> (Tensor out_a, Tensor out_b, Tensor lse_a, Tensor lse_b)"
_BACKWARD = (
    "(Tensor grad_out_a, Tensor grad_out_b, Tensor out_a, Tensor out_b, Tensor lse_a, Tensor lse_b, "
    f"{_PROBLEM}, int needs) -> (" + ", ".join(f"Tensor grad_{name}" for name in NEEDS) + ")"
)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem = CoAttentionProblem(*arguments)
    outs, lses = [], []
    for reader in (0, 1):
        one = problem.direction(reader)
        checks.check_shapes(one)
        rows, heads = one.query.shape[:2]
        outs.append(one.query.new_empty(rows, heads, one.value.shape[2]))
        lses.append(one.query.new_empty(heads, rows, dtype=torch.float32))
    return *outs, *lses


def _fake_backward(
    _ga: Tensor, _gb: Tensor, _oa: Tensor, _ob: Tensor, lse_a: Tensor, lse_b: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, needs = arguments
    problem = CoAttentionProblem(*fields)
    shapes = {"bias_a": lse_a, "bias_b": lse_b}
    like = {name: shapes.get(name, getattr(problem, name)) for name in NEEDS}
    return tuple(t.new_empty(t.shape if needs & NEEDS[name] else (0,)) for name, t in like.items())


for _backend in ("cpu", "triton"):
    for _name, _schema, _fake in (
        (f"co_attention_{_backend}", _FORWARD, _fake_forward),
        (f"co_attention_backward_{_backend}", _BACKWARD, _fake_backward),
    ):
        define(_name, _schema, _fake)
