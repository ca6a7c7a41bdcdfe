"""Backends of key importance: their order, what each supports, how each runs, and the fast path of eager CPU calls."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.ops.attention import backends as attention
from fastxattn.ops.importance.checks import check
from fastxattn.ops.importance.operator import FORWARD, Importance
from fastxattn.ops.importance.problem import OWN, Problem
from fastxattn.ops.importance.reference import importance_reference
from fastxattn.runtime import fast_path
from fastxattn.runtime.autocast import no_autocast
from fastxattn.runtime.backend import Backend
from fastxattn.runtime.operators import apply
from fastxattn.runtime.reasons import at_first_call

at_first_call(
    "importance_triton", ("CUDA", "CPU"), "fastxattn.ops.importance.kernels_triton", "importance_forward"
)  # on CPU tensors: the interpreter
_ATTENTION = {backend.name: backend for backend in attention.BACKENDS}


def _supports(name: str, problem: Problem) -> str | None:
    """The kernels of a backend support what its attention kernels do."""
    return _ATTENTION[name].supports(problem.attention())


def _run(name: str, problem: Problem) -> Tensor:
    """Run a compiled backend, differentiably."""
    return apply(Importance, FORWARD, name, problem)  # type: ignore[no-any-return]


def _reference(problem: Problem) -> Tensor:
    with no_autocast(problem.query.device):
        return importance_reference(problem)


BACKENDS = (
    *(Backend(name, functools.partial(_supports, name), functools.partial(_run, name)) for name in FORWARD),
    Backend("reference", lambda problem: None, _reference),
)


def run(problem: Problem, backend: str) -> Tensor:
    """Score (heads, slots_k)."""
    return fast_path.dispatch("importance", BACKENDS, problem, backend, fast=_fast, prepare=prepare)


def _fast(problem: Problem) -> Tensor | None:
    p = problem
    if p.query.dtype == torch.float64 or not p.plain_numbers():
        return None
    return _run("cpu", p)


def prepare(problem: Problem) -> Problem:
    """Dtypes and layouts as backends want them, checked; what is not a tensor passes through to the checks."""
    shared = attention.laid_out(problem.attention())
    changes: dict[str, Any] = {name: getattr(shared, name) for name in Problem.names if name not in OWN}
    if isinstance(problem.lse, Tensor) and problem.lse.layout == torch.strided:
        changes["lse"] = problem.lse.contiguous()
    problem = problem.replace(**changes)
    if not is_compiling():  # while tracing, the operator's fake checks
        check(problem)
    return problem
