"""Gather and merge of rows, differentiable any number of times."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.checks import check_tensor
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.checks import check_device
from fastxattn.ops.pruning.problem import Gather, Merge


def _as_rows(x: Tensor) -> Tensor:
    """(rows, channels), contiguous."""
    return (x.flatten(1) if x.ndim > 1 else x[:, None]).contiguous()


def _checked(x: Tensor, name: str, index: Tensor, coefficient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous index and coefficient, refused where they are on another device than ``x``."""
    for argument, t in (("x", x), (name, index)):
        check_tensor(argument, t)
    check_device(name, index, "x", x)
    if coefficient is not None:
        check_device("coefficient", coefficient, "x", x)
        coefficient = coefficient.contiguous()
    return index.contiguous(), coefficient


def gather_rows(x: Tensor, index: Tensor, coefficient: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``out[j] = coefficient[j] * x[index[j]]``, 0 where the index is -1. Differentiable in ``x`` and ``coefficient``.

    Args:
        x: (rows, ...) tokens.
        index: (n,) int32 in [-1, rows).
        coefficient: (n,) float32 or None for 1.
        backend: auto, cpu, triton or reference.
    """
    index, coefficient = _checked(x, "index", index, coefficient)
    out: Tensor = run(Gather(x=_as_rows(x), index=index, coefficient=coefficient), backend)
    return out.reshape(index.shape[0], *x.shape[1:])


def merge_rows(
    x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int, *, backend: str = "auto"
) -> Tensor:
    """``out[a] = sum of coefficient[i] * x[i] over assignment[i] == a``: the transpose of :func:`gather_rows`.

    Args:
        x: (total, ...) tokens.
        assignment: (total,) int32 in [-1, rows); rows of -1 take no part, whatever they hold.
        coefficient: (total,) float32 or None for 1.
        rows: of the result.
        backend: auto, cpu, triton, cuda or reference.
    """
    assignment, coefficient = _checked(x, "assignment", assignment, coefficient)
    out: Tensor = run(Merge(x=_as_rows(x), assignment=assignment, coefficient=coefficient, rows=rows), backend)
    return out.reshape(rows, *x.shape[1:])
