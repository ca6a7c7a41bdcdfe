"""Operators of pruning: one for each operation and compiled backend, their fakes, and the derivatives of two.

Gather and merge are linear and each other's transpose: each one's backward is the other's forward, called so that
autograd sees it, and derivatives of any order exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.pruning.problem import PROBLEMS, Gather, Greedy, Match, Merge, Quantile, Select
from fastxattn.runtime import reasons
from fastxattn.runtime.operators import KernelFunction, define, differentiable, run


def _select(p: Select) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = p.scores.new_empty(p.capacity, dtype=torch.int32)
    assignment = p.scores.new_empty(p.scores.shape[0], dtype=torch.int32)
    gathered = p.scores.new_empty(0) if p.x is None else p.x.new_empty(p.capacity, p.x.shape[1])
    return index, torch.empty_like(p.cu_seqlens), assignment, gathered


def _gather(p: Gather) -> Tensor:
    return p.x.new_empty(p.index.shape[0], p.x.shape[1])


def _merge(p: Merge) -> Tensor:
    return p.x.new_empty(p.rows, p.x.shape[1])


def _match(p: Match) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p.a_index), p.x.new_empty(p.a_index.shape[0], dtype=torch.float32)


def _greedy(p: Greedy) -> Tensor:
    return p.x.new_empty(p.x.shape[0], dtype=torch.float32)


def _quantile(p: Quantile) -> Tensor:
    return p.scores.new_empty(p.cu_seqlens.shape[0] - 1, p.q.shape[0])


_FAKES: dict[str, Callable[..., Any]] = {
    "select": _select,
    "gather": _gather,
    "merge": _merge,
    "match": _match,
    "greedy": _greedy,
    "quantile": _quantile,
}
_KEYS = {"triton": ("CUDA", "CPU"), "cuda": ("CUDA",)}
for _name, _kind in PROBLEMS.items():
    for _backend in _kind.compiled:
        _operator = f"pruning_{_name}_{_backend}"
        define(_operator, f"({_kind.schema()}) -> {_kind.results}", _kind.positional(_FAKES[_name]))
        if _backend in _KEYS:  # the CPU library registers its own
            _module = f"fastxattn.ops.pruning.kernels_{_backend}"
            reasons.at_first_call(_operator, _KEYS[_backend], _module, _name, of=_kind.of)


def operator(name: str, backend: str) -> Any:
    """The operator of one operation on one compiled backend."""
    return getattr(torch.ops.fastxattn, f"pruning_{name}_{backend}").default


class GatherFunction(KernelFunction):
    """out = GatherFunction.apply(backend, x, index, coefficient): rows by index."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> Tensor:
        """Run the backend's operator."""
        return run(operator("gather", backend), *arguments)  # type: ignore[no-any-return]

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
            grad_x = rows(ctx.backend, "merge", grad.contiguous(), index, coefficient, ctx.rows)
        if x is not None:
            grad_c = _inner(grad, rows(ctx.backend, "gather", x, index, None), index, coefficient)
        return None, grad_x, None, grad_c


class MergeFunction(KernelFunction):
    """out = MergeFunction.apply(backend, x, assignment, coefficient, rows): sums of rows by destination."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> Tensor:
        """Run the backend's operator."""
        return run(operator("merge", backend), *arguments)  # type: ignore[no-any-return]

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
            grad_x = rows(ctx.backend, "gather", grad, assignment, coefficient)
        if x is not None:
            grad_c = _inner(rows(ctx.backend, "gather", grad, assignment, None), x, assignment, coefficient)
        return None, grad_x, None, grad_c, None


def _for_coefficient(x: Tensor, coefficient: Tensor | None) -> Tensor | None:
    return x if coefficient is not None and coefficient.requires_grad else None


def _inner(left: Tensor, right: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Inner products of the two rows that each index entry joins, 0 at -1."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    products = (left.to(wide) * right.to(wide)).sum(1)
    return torch.where(index >= 0, products, 0.0).to(coefficient.dtype)


_FUNCTIONS: dict[str, Any] = {"gather": GatherFunction, "merge": MergeFunction}


def rows(backend: str, name: str, *arguments: Any) -> Tensor:
    """Gather or merge differentiably; a traced program keeps the operator, which has its derivative, whole."""
    if backend not in PROBLEMS[name].compiled:  # the CUDA library gathers only in the launch that selects
        backend = "triton"
    if torch.compiler.is_compiling():
        return operator(name, backend)(*arguments)  # type: ignore[no-any-return]
    return _FUNCTIONS[name].apply(backend, *arguments)  # type: ignore[no-any-return]


for _name, _function in _FUNCTIONS.items():
    for _backend in PROBLEMS[_name].compiled:
        differentiable(f"pruning_{_name}_{_backend}", functools.partial(_function.apply, _backend))
