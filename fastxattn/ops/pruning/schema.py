"""Operator schemas of token pruning: six operations per compiled backend, and their fakes.

Everything works on packed tokens: rows of all sequences end to end, ``cu_seqlens`` (batch + 1,) int32. Rows of results
that stand for nothing are 0, indices that stand for nothing are -1.

* ``select(scores, cu_seqlens, counts, protected, x, capacity)``: the ``counts[b]`` best rows of each sequence.
* ``gather(x, index, coefficient)``: ``out[j] = coefficient[j] * x[index[j]]``.
* ``merge(x, assignment, coefficient, rows)``: ``out[a] = sum of coefficient[i] * x[i] over assignment[i] == a``, in
  ascending ``i``; the transpose of ``gather``.
* ``match(x, a_index, cu_a, b_index, cu_b)``: for each row of A the most similar row of B of the same sequence.
* ``greedy(x, quality, cu_seqlens, counts, protected, mode, max_count)``: the order in which a greedy search
  picks rows; no sequence gets more than ``max_count`` picks (it bounds scratch memory by a number known beforehand).
* ``quantile(scores, cu_seqlens, q)``: quantiles of each sequence's scores.

The functions of :mod:`fastxattn.ops.pruning.reference` say exactly what each computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.runtime.operators import define

MAX_MIN, DETERMINANT = 0, 1
"""``mode`` of ``greedy``."""

SCHEMAS = {
    "select": "(Tensor scores, Tensor cu_seqlens, Tensor counts, Tensor? protected, Tensor? x, SymInt capacity) -> "
    "(Tensor keep_index, Tensor cu_keep, Tensor assignment, Tensor gathered)",
    "gather": "(Tensor x, Tensor index, Tensor? coefficient) -> Tensor",
    "merge": "(Tensor x, Tensor assignment, Tensor? coefficient, SymInt rows) -> Tensor",
    "match": "(Tensor x, Tensor a_index, Tensor cu_a, Tensor b_index, Tensor cu_b) -> (Tensor best, Tensor similarity)",
    "greedy": "(Tensor x, Tensor? quality, Tensor cu_seqlens, Tensor counts, Tensor? protected, int mode, "
    "int max_count) -> Tensor",
    "quantile": "(Tensor scores, Tensor cu_seqlens, Tensor q) -> Tensor",
}
BACKENDS = {"cpu": tuple(SCHEMAS), "triton": tuple(SCHEMAS), "cuda": ("select", "merge", "match")}
"""Which operations each compiled backend has."""


def _select(
    scores: Tensor, cu_seqlens: Tensor, counts: Tensor, protected: Tensor | None, x: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = scores.new_empty(capacity, dtype=torch.int32)
    assignment = scores.new_empty(scores.shape[0], dtype=torch.int32)
    gathered = scores.new_empty(0) if x is None else x.new_empty(capacity, x.shape[1])
    return index, torch.empty_like(cu_seqlens), assignment, gathered


def _gather(x: Tensor, index: Tensor, coefficient: Tensor | None) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _merge(x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1])


def _match(x: Tensor, a_index: Tensor, cu_a: Tensor, b_index: Tensor, cu_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a_index), x.new_empty(a_index.shape[0], dtype=torch.float32)


def _greedy(
    x: Tensor,
    quality: Tensor | None,
    cu_seqlens: Tensor,
    counts: Tensor,
    protected: Tensor | None,
    mode: int,
    max_count: int,
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _quantile(scores: Tensor, cu_seqlens: Tensor, q: Tensor) -> Tensor:
    return scores.new_empty(cu_seqlens.shape[0] - 1, q.shape[0])


_FAKES: dict[str, Callable[..., Any]] = {
    "select": _select,
    "gather": _gather,
    "merge": _merge,
    "match": _match,
    "greedy": _greedy,
    "quantile": _quantile,
}
for _backend, _names in BACKENDS.items():
    for _name in _names:
        define(f"pruning_{_name}_{_backend}", SCHEMAS[_name], _FAKES[_name])
