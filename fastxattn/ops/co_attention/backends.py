"""Backends of co-attention: their order, what each supports, how each runs, and the fast path of eager CPU calls.

A backend supports what its attention supports in both directions. It runs the operation's own kernels where those are
faster than two calls of attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.ops.attention import backends as attention
from fastxattn.ops.co_attention.checks import check, check_sides
from fastxattn.ops.co_attention.operator import FORWARD, CoAttention
from fastxattn.ops.co_attention.problem import Problem, roles
from fastxattn.runtime import fast_path
from fastxattn.runtime.backend import Backend, preferring
from fastxattn.runtime.operators import apply
from fastxattn.runtime.reasons import at_first_call

Both = tuple[Tensor, Tensor]
FEW_TOKENS = 24
for _operator in ("forward", "backward"):
    at_first_call(
        "co_attention_triton" if _operator == "forward" else "co_attention_backward_triton",
        ("CUDA", "CPU"),  # on CPU tensors: the interpreter
        "fastxattn.ops.co_attention.kernels_triton",
        f"co_attention_{_operator}",
    )


def _cpu_pays(problem: Problem) -> bool:
    """Measured to be faster unless one side has few tokens on average."""
    batch = max(problem.cu_seqlens_a.shape[0] - 1, 1)
    return min(problem.query_a.shape[0], problem.query_b.shape[0]) >= FEW_TOKENS * batch


ONE_PASS: dict[str, Callable[[Problem], bool]] = {"cpu": _cpu_pays, "triton": lambda problem: False}
"""Backends with kernels of their own, and whether those are faster than two calls of attention.

Triton's are not: on an H200 two calls took 0.57 to 0.77 of their time at every size (docs/design/gpu.md). They remain
for devices where products cost more.
"""


def one_pass(name: str, problem: Problem) -> Both:
    """Run a backend's own kernels, differentiably."""
    return apply(CoAttention, FORWARD, name, problem)[:2]  # type: ignore[no-any-return]


def two_calls(name: str, problem: Problem) -> Both:
    """Run a backend's attention in each direction."""
    return attention.run_on(name, problem.direction(0))[0], attention.run_on(name, problem.direction(1))[0]


def _run(name: str, problem: Problem) -> Both:
    # An exported graph keeps to attention, which other runtimes know.
    if name in ONE_PASS and not torch.compiler.is_exporting() and ONE_PASS[name](problem):
        return one_pass(name, problem)
    return two_calls(name, problem)


def _supports(one: Backend, problem: Problem) -> str | None:
    return one.supports(problem.direction(0)) or one.supports(problem.direction(1))


BACKENDS = tuple(
    Backend(one.name, functools.partial(_supports, one), functools.partial(_run, one.name))
    for one in attention.BACKENDS
)


def run(problem: Problem, backend: str) -> Both:
    """(out_a, out_b)."""
    return fast_path.dispatch("co_attention", in_order, problem, backend, fast=_fast, prepare=prepare)


def in_order(problem: Problem) -> tuple[Backend, ...]:
    """The table, with the CUDA kernels first for float32 on a GPU."""
    query = problem.query_a
    return preferring(BACKENDS, "cuda" if query.is_cuda and query.dtype == torch.float32 else None)


def _fast(problem: Problem) -> Both | None:
    sound = problem.plain_numbers()
    return one_pass("cpu", problem) if sound and ONE_PASS["cpu"](problem) else None


def prepare(problem: Problem) -> Problem:
    """Dtypes and layouts as attention wants them in both directions, checked."""
    changes: dict[str, Any] = {}
    for reader in (1, 0):  # what both directions share is prepared alike; numbers are attention's own
        one = attention.laid_out(problem.direction(reader))
        changes |= {name: getattr(one, role) for role, name in roles(reader).items()}
        changes |= {name: getattr(one, name) for name in Problem.numbers}
    problem = problem.replace(**changes)
    (check_sides if is_compiling() else check)(problem)  # while tracing, the operator's fake checks the rest
    return problem
