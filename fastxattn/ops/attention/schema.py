"""Operator schemas of the attention op: one forward and one backward per compiled backend, and their fakes.

Arguments common to all of them:

* ``query`` (rows_q, heads, head_dim), ``key`` (rows_k, kv_heads, head_dim), ``value`` (rows_k, kv_heads, value_dim);
* ``cu_seqlens_q/k`` (batch + 1,) int32: where each sequence's *slots* start. Without an index, slot = row;
* ``seqused_q/k`` (batch,) int32 or None: use only the first so many slots of each sequence;
* ``query_index`` / ``key_index`` (slots,) int32 or None: the row that a slot stands for;
* ``kv_range`` (rows_q, 2) int32 or None: by query row, the visible key slots [start, end) of its own sequence; one
  that leaves it is refused (cpu) or clamped (triton, cuda);
* ``key_bias`` (rows_k,) or (rows_k, heads) float32 or None: by key row, added to the scaled, capped score;
* ``bias`` 4-D (batch|1, heads|1, rows of q per sequence|1, rows of k per sequence|1) or None, for the padded layout:
  indexed by the row's place in its sequence (row - cu_seqlens[b]);
* ``dropout_seed`` (1,) int64 or None.

Forward returns ``out`` (rows_q, heads, value_dim) in the query's dtype and ``lse`` (heads, rows_q) float32
(cpu, and triton of float32: float64, unrounded for what is made from it), with 0 and -inf in rows that no slot stands
for or that see no key. Backward returns gradients for query, key, value, key_bias and bias; those not asked for in
``needs`` (a bit mask, see :data:`NEEDS`) are empty tensors of shape (0,). All results are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.checks import check_shapes
from fastxattn.ops.attention.problem import Problem
from fastxattn.runtime.operators import define

NEEDS = {"query": 1, "key": 2, "value": 4, "key_bias": 8, "bias": 16}

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, Tensor? query_index, Tensor? key_index, Tensor? kv_range, Tensor? key_bias, Tensor? bias, "
    "float scale, float softcap, float dropout_p, Tensor? dropout_seed"
)
_FORWARD = f"({_PROBLEM}) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_PROBLEM}, int needs) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias, Tensor grad_bias)"
)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments)
    check_shapes(problem)
    query = problem.query
    out = query.new_empty(query.shape[0], query.shape[1], problem.value.shape[2])
    return out, query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _fake_forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(*arguments)
    # An ONNX graph holds our operator's node, which returns float32.
    return out, lse if torch.onnx.is_in_onnx_export() else lse.double()


def _fake_forward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(*arguments)
    return out, lse.double() if out.dtype == torch.float32 else lse


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, needs = arguments
    problem = Problem(*fields)
    return tuple(
        t.new_empty(t.shape) if t is not None and needs & bit else problem.query.new_empty(0)
        for bit, t in ((bit, getattr(problem, name)) for name, bit in NEEDS.items())
    )


_FAKES = {"cpu": _fake_forward_cpu, "triton": _fake_forward_triton, "cuda": _fake_forward}
for _backend in _FAKES:
    define(f"attention_{_backend}", _FORWARD, _FAKES[_backend])
    define(f"attention_backward_{_backend}", _BACKWARD, _fake_backward)
