"""Validation of key importance: attention's checks, and those of ``lse`` and the row weights."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.attention import checks as attention
from fastxattn.ops.checks import check_tensor, check_wide, readable
from fastxattn.ops.importance.problem import Problem

REDUCTIONS = ("mean", "sum", "max", "none")


def check_shapes(problem: Problem) -> None:
    """Types, dtypes, shapes, devices and numbers.

    Raises:
        TypeError: something is not a tensor or a number, or has the wrong dtype.
        ValueError: a shape, device or number is wrong.
    """
    attention.check_shapes(problem.attention())
    rows, heads = problem.query.shape[:2]
    lse, weight = problem.lse, problem.row_weight
    _check_statistic("lse", lse, problem.query)
    if lse.ndim != 2 or lse.shape[0] != heads or lse.shape[1] != rows:
        raise ValueError(f"lse must have shape (heads, query tokens), ({heads}, {rows}); got {tuple(lse.shape)}")
    if weight is not None:
        _check_statistic("row_weight", weight, problem.query)
        if weight.ndim not in (1, 2) or weight.shape[-1] != rows or (weight.ndim == 2 and weight.shape[0] != heads):
            raise ValueError(
                f"row_weight must have shape (query tokens,) or (heads, query tokens), ({rows},) or ({heads}, {rows}); "
                f"got {tuple(weight.shape)}"
            )


def check(problem: Problem) -> None:
    """:func:`check_shapes`, and the contents of offsets and indices where reading them does not wait for a device."""
    check_shapes(problem)
    if readable(problem.cu_seqlens_q):
        attention.check_contents(problem.attention())


def check_reduction(reduction: object) -> None:
    """ValueError unless ``reduction`` is a known one over heads."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def _check_statistic(name: str, t: object, query: Tensor) -> None:
    check_tensor(name, t, query)
    assert isinstance(t, Tensor)
    check_wide(name, t, query)
