"""Gather and merge are linear and each other's transpose: each one's backward is the other's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.pruning.ops import _implementation


def _coefficient_grad(grad: Tensor, x: Tensor, index: Tensor, x_is_long: bool, backend: str) -> Tensor:
    """Of ``sum grad[a] * c * x[i]``: the inner product of the two rows that each index entry joins, 0 at -1."""
    gather = _implementation("gather", backend)
    left, right = (gather(grad, index, None), x) if x_is_long else (grad, gather(x, index, None))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    products = (left.to(wide) * right.to(wide)).sum(1)
    return torch.where(index >= 0, products, 0.0)


class Gather(torch.autograd.Function):
    """Rows by index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, coefficient: Tensor | None, backend: str) -> Tensor:
        ctx.rows, ctx.backend = x.shape[0], backend
        ctx.save_for_backward(index, coefficient, x if coefficient is not None and coefficient.requires_grad else None)
        return _implementation("gather", backend)(x, index, coefficient)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        index, coefficient, x = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _implementation("merge", ctx.backend)(grad, index, coefficient, ctx.rows)
        grad_c = None
        if x is not None:
            grad_c = _coefficient_grad(grad, x, index, False, ctx.backend).to(coefficient.dtype)
        return grad_x, None, grad_c, None


class Merge(torch.autograd.Function):
    """Sums of rows by destination."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int, backend: str) -> Tensor:
        ctx.backend = backend
        saved = x if coefficient is not None and coefficient.requires_grad else None
        ctx.save_for_backward(assignment, coefficient, saved)
        return _implementation("merge", backend)(x, assignment, coefficient, rows)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        assignment, coefficient, x = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _implementation("gather", ctx.backend)(grad, assignment, coefficient)
        grad_c = None
        if x is not None:
            grad_c = _coefficient_grad(grad, x, assignment, True, ctx.backend).to(coefficient.dtype)
        return grad_x, None, grad_c, None, None
