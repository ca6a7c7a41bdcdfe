"""Operator schemas of the contrastive losses: statistics over a similarity matrix that is never stored.

The problem, common to all: features ``a`` (N, D) and ``b`` (M, D); logits ``scale * norm_a * norm_b * <a, b> + bias``
with one-element float32 ``scale`` and ``bias`` and optional per-row factors; a pair is positive where ``id_a`` and
``id_b`` (int32) are equal, ignored where it is not positive and ``skip_a`` equals ``skip_b``; ``exact`` (N,) is the
precise logit of each row's only positive.

``contrastive_stats`` returns (7, N) and (7, M) float32: :data:`STATS`. The first four carry a gradient, which
``contrastive_backward`` takes as (4, N) and (4, M); it returns gradients of a and b and, per row, the sum of
dz * logit / scale; gradients are in the features' dtype, or with the bit :data:`WIDE` in ``needs`` in float32.
``sigmoid`` returns per-row sums of its terms and, with ``needs``, the gradients of their sum
weighted by ``weight`` in the same pass, in float32. Results not in ``needs`` have no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastxattn.runtime.operators import define

STATS = ("lse_neg", "mean_neg", "mean_pos", "excess_pos", "num_neg", "num_pos", "ahead")
GRADS = 4
NEEDS = {"a": 1, "b": 2, "scale": 4}
WIDE = 8

PROBLEM = (
    "Tensor a, Tensor b, Tensor scale, Tensor? bias, Tensor? norm_a, Tensor? norm_b, Tensor? id_a, Tensor? id_b, "
    "Tensor? skip_a, Tensor? skip_b, Tensor? exact, bool exclude_self"
)
LIMITS = "Tensor? limit_row, Tensor? limit_col"


def _positive_fake(a: torch.Tensor, *args: object) -> torch.Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.float32)


def _stats_fake(a: torch.Tensor, b: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
    def planes(x: torch.Tensor) -> torch.Tensor:
        return a.new_empty((len(STATS), x.shape[0]), dtype=torch.float32)

    return planes(a), planes(b)


def _backward_fake(
    grad_row: torch.Tensor,
    grad_col: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *args: object,
) -> tuple[torch.Tensor, ...]:
    needs = args[-1]
    assert isinstance(needs, int)
    dtype = torch.float32 if needs & WIDE else a.dtype
    grad_a = a.new_empty(a.shape, dtype=dtype) if needs & NEEDS["a"] else a.new_empty((0,), dtype=torch.float32)
    grad_b = b.new_empty(b.shape, dtype=dtype) if needs & NEEDS["b"] else b.new_empty((0,), dtype=torch.float32)
    return grad_a, grad_b, a.new_empty((a.shape[0],), dtype=torch.float32)


def _sigmoid_fake(a: torch.Tensor, b: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
    needs = args[-1]
    assert isinstance(needs, int)

    def floats(*shape: int) -> torch.Tensor:
        return a.new_empty(shape, dtype=torch.float32)

    rows = a.shape[0] if needs else 0
    grad_a = floats(*a.shape) if needs & NEEDS["a"] else floats(0)
    grad_b = floats(*b.shape) if needs & NEEDS["b"] else floats(0)
    return floats(a.shape[0]), grad_a, grad_b, floats(rows), floats(rows)


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "positive_logits": (f"({PROBLEM}, bool blocked) -> Tensor", _positive_fake),
    "contrastive_stats": (
        f"({PROBLEM}, {LIMITS}, Tensor? rank_row, Tensor? rank_col, bool rows, bool columns, bool means) -> "
        "(Tensor row_stats, Tensor col_stats)",
        _stats_fake,
    ),
    "contrastive_backward": (
        "(Tensor grad_row, Tensor grad_col, Tensor row_stats, Tensor col_stats, "
        f"{PROBLEM}, {LIMITS}, bool rows, bool columns, int needs) -> (Tensor grad_a, Tensor grad_b, Tensor dot)",
        _backward_fake,
    ),
    "sigmoid": (
        f"({PROBLEM}, Tensor? weight, int needs) -> "
        "(Tensor loss, Tensor grad_a, Tensor grad_b, Tensor dot, Tensor row_dz)",
        _sigmoid_fake,
    ),
}
for _backend in ("cpu", "triton", "cuda"):
    for _name, (_signature, _fake) in OPERATORS.items():
        define(f"{_name}_{_backend}", _signature, _fake)
