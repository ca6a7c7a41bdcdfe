"""What is wrong with a key-importance call: attention's checks, and those of lse and the row weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.attention import checks
from fastxattn.ops.importance.problem import ImportanceProblem

REDUCTIONS = ("mean", "sum", "max", "none")


def check_shapes(problem: ImportanceProblem) -> None:
    """Types, dtypes, shapes, devices and numbers.

    Raises:
        TypeError: something is not a tensor or a number, or has the wrong dtype.
        ValueError: a shape, device or number is wrong.
    """
    checks.check_shapes(problem.attention())
    query = problem.query
    rows, heads = query.shape[0], query.shape[1]
    _check_statistic("lse", problem.lse, query)
    if problem.lse.ndim != 2 or problem.lse.shape[0] != heads or problem.lse.shape[1] != rows:
        raise ValueError(
            f"lse must have shape (heads, query tokens), ({heads}, {rows}); got {tuple(problem.lse.shape)}"
        )
    weight = problem.row_weight
    if weight is not None:
        _check_statistic("row_weight", weight, query)
        if weight.ndim not in (1, 2) or weight.shape[-1] != rows or (weight.ndim == 2 and weight.shape[0] != heads):
            raise ValueError(
                f"row_weight must have shape (query tokens,) or (heads, query tokens), ({rows},) or ({heads}, {rows}); "
                f"got {tuple(weight.shape)}"
            )


def check_reduction(reduce: object) -> None:
    """ValueError unless ``reduce`` is a known reduction over heads."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")


def _check_statistic(name: str, t: object, query: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
    wide = torch.promote_types(query.dtype, torch.float32)
    if t.dtype != wide:
        raise TypeError(f"{name} must be {wide} beside a {query.dtype} query; got {t.dtype}")
    if t.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}; got {t.device}")
