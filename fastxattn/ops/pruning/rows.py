"""Gather and merge of rows: linear, each other's transpose, differentiable any number of times.

Each one's backward is the other's forward, called so that autograd sees it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.offsets import check_dense
from fastxattn.ops.pruning.checks import check_device
from fastxattn.ops.pruning.ops import BACKENDS, backends, implementation
from fastxattn.ops.pruning.schema import BACKENDS as COMPILED
from fastxattn.runtime.backend import resolve
from fastxattn.runtime.operators import KernelFunction, differentiable, run


class Gather(KernelFunction):
    """out = Gather.apply(backend, x, index, coefficient): rows by index."""

    @staticmethod
    def forward(backend: str, x: Tensor, index: Tensor, coefficient: Tensor | None) -> Tensor:
        """Run the backend's operator."""
        return run(implementation("gather", backend), x, index, coefficient)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save ``x`` only for the coefficient's gradient."""
        ctx.backend, x, index, coefficient = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(index, coefficient, _for_coefficient(x, coefficient))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of the coefficient: sum over channels of ``grad[j] * x[index[j]]``."""
        index, coefficient, x = ctx.saved_tensors
        grad_x = grad_c = None
        if ctx.needs_input_grad[1]:
            grad_x = _apply("merge", ctx.backend, grad.contiguous(), index, coefficient, ctx.rows)
        if x is not None:
            grad_c = _inner(grad, _apply("gather", ctx.backend, x, index, None), index, coefficient)
        return None, grad_x, None, grad_c


class Merge(KernelFunction):
    """out = Merge.apply(backend, x, assignment, coefficient, rows): sums of rows by destination."""

    @staticmethod
    def forward(backend: str, x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int) -> Tensor:
        """Run the backend's operator."""
        return run(implementation("merge", backend), x, assignment, coefficient, rows)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save ``x`` only for the coefficient's gradient."""
        ctx.backend, x, assignment, coefficient, _ = inputs
        ctx.save_for_backward(assignment, coefficient, _for_coefficient(x, coefficient))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of the coefficient: sum over channels of ``grad[assignment[i]] * x[i]``."""
        assignment, coefficient, x = ctx.saved_tensors
        grad, grad_x, grad_c = grad.contiguous(), None, None
        if ctx.needs_input_grad[1]:
            grad_x = _apply("gather", ctx.backend, grad, assignment, coefficient)
        if x is not None:
            grad_c = _inner(_apply("gather", ctx.backend, grad, assignment, None), x, assignment, coefficient)
        return None, grad_x, None, grad_c, None


def _for_coefficient(x: Tensor, coefficient: Tensor | None) -> Tensor | None:
    return x if coefficient is not None and coefficient.requires_grad else None


def _inner(left: Tensor, right: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Inner products of the two rows that each index entry joins, 0 at -1."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    products = (left.to(wide) * right.to(wide)).sum(1)
    return torch.where(index >= 0, products, 0.0).to(coefficient.dtype)


def _apply(name: str, backend: str, *arguments: Any) -> Tensor:
    """Gather or merge on a backend: its operator in a traced program, eager torch for the reference."""
    if backend == "cuda" and name not in COMPILED["cuda"]:
        backend = "triton"
    if backend == "reference" or torch.compiler.is_compiling():
        return implementation(name, backend)(*arguments)  # type: ignore[no-any-return]
    return (Gather if name == "gather" else Merge).apply(backend, *arguments)  # type: ignore[no-any-return]


for _name, _function in (("gather", Gather), ("merge", Merge)):
    for _backend, _names in COMPILED.items():
        if _name in _names:
            differentiable(f"pruning_{_name}_{_backend}", functools.partial(_function.apply, _backend))


def _as_rows(x: Tensor) -> Tensor:
    """(rows, channels), contiguous."""
    return (x.flatten(1) if x.ndim > 1 else x[:, None]).contiguous()


def _checked(x: Tensor, name: str, index: Tensor, coefficient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Index and coefficient as kernels want them, refused where they are on another device than ``x``."""
    for argument, t in (("x", x), (name, index)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{argument} must be a tensor; got {type(t).__name__}")
        check_dense(argument, t)
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
        backend: auto, triton, cpu or reference.
    """
    index, coefficient = _checked(x, "index", index, coefficient)
    chosen = resolve("pruning.gather", BACKENDS, x, backend)
    return _apply("gather", chosen, _as_rows(x), index, coefficient).reshape(index.shape[0], *x.shape[1:])


def merge_rows(
    x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int, *, backend: str = "auto"
) -> Tensor:
    """``out[a] = sum of coefficient[i] * x[i] over assignment[i] == a``: the transpose of :func:`gather_rows`.

    Args:
        x: (total, ...) tokens.
        assignment: (total,) int32 in [-1, rows); rows of -1 take no part, whatever they hold.
        coefficient: (total,) float32 or None for 1.
        rows: of the result.
        backend: auto, triton, cpu or reference.
    """
    assignment, coefficient = _checked(x, "assignment", assignment, coefficient)
    chosen = resolve("pruning.merge", backends("merge"), x, backend)
    return _apply("merge", chosen, _as_rows(x), assignment, coefficient, rows).reshape(rows, *x.shape[1:])
