"""Backends of the six operations: their order, every reason why not, and how each one runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastxattn.ops.pruning import operator, reference
from fastxattn.ops.pruning.problem import PROBLEMS, Problem
from fastxattn.runtime import reasons
from fastxattn.runtime.backend import Backend, dispatch
from fastxattn.runtime.operators import plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _takes(shared: Callable[..., str | None]) -> Callable[[Problem], str | None]:
    """``shared`` reasons of a backend, and the dtypes that all kernels of pruning take."""

    def supports(p: Problem) -> str | None:
        data = p.data
        if (reason := shared(data)) is not None or data.dtype in _DTYPES:
            return reason
        return f"it takes float32, bfloat16 and float16, and the tensors are {str(data.dtype).removeprefix('torch.')}"

    return supports


_SUPPORTS: dict[str, Callable[[Any], str | None]] = {
    "cpu": _takes(reasons.cpu),
    "triton": _takes(reasons.triton),
    "cuda": _takes(reasons.cuda),
    "reference": lambda p: None,
}
"""In the order in which ``auto`` tries them. CUDA's gather was slower than Triton's for every dtype (H200)."""


def _run(name: str, backend: str) -> Callable[[Any], Any]:
    if backend == "reference":
        return getattr(reference, name)  # type: ignore[no-any-return]
    if name in ("gather", "merge"):
        return functools.partial(_differentiable, name, backend)
    return functools.partial(_operator, operator.operator(name, backend))


def _differentiable(name: str, backend: str, p: Problem) -> Any:
    return operator.rows(backend, name, *p.values())


def _operator(operator: Any, p: Problem) -> Any:
    return plain(operator, *p.values())


BACKENDS = {
    name: tuple(
        Backend(backend, supports, _run(name, backend))
        for backend, supports in _SUPPORTS.items()
        if backend in (*kind.compiled, "reference")
    )
    for name, kind in PROBLEMS.items()
}
"""By operation."""


def run(p: Problem, backend: str) -> Any:
    """The results of ``p`` on the backend asked for, differentiable where the operation is (gather, merge).

    Raises:
        ValueError: the operation lacks the backend.
        RuntimeError: the backend cannot run this problem.
    """
    return dispatch(f"pruning.{p.operation}", BACKENDS[p.operation], p, backend)
