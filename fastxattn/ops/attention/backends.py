"""Backends of attention: the table, its order, every reason why not, and a fast path for eager CPU calls."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastxattn.ops.attention import checks, kernels_flash
from fastxattn.ops.attention.operator import FORWARD, Attention
from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.reference import attention_reference
from fastxattn.ops.attention.triton.tiles import kind_of, padded_dim
from fastxattn.ops.checks import float_of, readable
from fastxattn.runtime import backend, fast_path, reasons, tuning
from fastxattn.runtime.autocast import cast, no_autocast
from fastxattn.runtime.backend import Backend, preferring
from fastxattn.runtime.operators import apply

_INDICES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index", "kv_range")
direct = torch.ops.fastxattn.attention_cpu.default._op
"""The operator without Python's dispatch layer, for eager tensors: a fifth of a tiny call's time."""


def _too_wide(problem: Problem, most: int = 256, beside: str = "") -> str | None:
    dims = problem.query.shape[2], problem.value.shape[2]
    if max(dims) > most:
        return f"it needs head_dim and value_dim up to {most}{beside}, got {dims[0]} and {dims[1]}"
    return None


def supports_cpu(problem: Problem) -> str | None:
    """Why the C++ kernel for CPUs does not run this problem; None when it does."""
    return reasons.cpu(problem.query) or _too_wide(problem)


def supports_triton(problem: Problem) -> str | None:
    """Why the Triton kernels do not run this problem; None when they do."""
    return reasons.triton(problem.query) or _too_wide(problem)


def supports_cuda(problem: Problem) -> str | None:
    """Why the CUDA C++ kernels do not run this problem; None when they do."""
    query = problem.query
    if (reason := reasons.float64(query)) is not None:
        return reason
    if (reason := _too_wide(problem, 128 if query.dtype == torch.float32 else 256, f" with {query.dtype}")) is not None:
        return reason
    for name, used in (("bias", problem.bias is not None), ("dropout", bool(problem.dropout_p))):
        if used:
            return f"it has no {name}"
    return reasons.cuda(query)


def _compiled(name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    return apply(Attention, FORWARD, name, problem)  # type: ignore[no-any-return]


def _reference(problem: Problem) -> tuple[Tensor, Tensor]:
    with no_autocast(problem.query.device):
        return attention_reference(problem)


BACKENDS = (
    Backend("cpu", supports_cpu, functools.partial(_compiled, "cpu")),
    Backend("triton", supports_triton, functools.partial(_compiled, "triton")),
    Backend("cuda", supports_cuda, functools.partial(_compiled, "cuda")),
    Backend("flash", kernels_flash.supports, kernels_flash.attend),
    Backend("reference", lambda problem: None, _reference),
)


def run_on(name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Out and lse of a validated problem on a backend, differentiably."""
    return backend.run_on(name, BACKENDS, problem)  # type: ignore[no-any-return]


def in_order(problem: Problem) -> tuple[Backend, ...]:
    """The table, with the backend first that was measured to be the fastest on this device, if any was.

    Where nothing was measured, float32 goes to the CUDA kernels: on an H200 they took a half to a fifth of the time of
    Triton's, which were the faster ones in 16 bits. A traced program takes the table as it is.
    """
    if is_compiling() or not problem.query.is_cuda:
        return BACKENDS
    dim = padded_dim(max(problem.query.shape[2], problem.value.shape[2]))
    kind = kind_of(problem.query.element_size(), problem.rich)
    best = tuning.preferred("attention", kind, dim, problem.query.device)
    return preferring(BACKENDS, best or ("cuda" if problem.query.dtype == torch.float32 else None))


def run(problem: Problem, requested: str) -> tuple[Tensor, Tensor]:
    """Out and lse of a problem whose ``scale`` is filled in and whose seed is drawn."""
    return fast_path.dispatch("attention", in_order, problem, requested, fast=_fast, prepare=prepare)


def _fast(problem: Problem) -> tuple[Tensor, Tensor] | None:
    if not problem.plain_numbers():
        return None
    values = type(problem)._get(problem)
    if problem.tracked():
        return Attention.apply("cpu", *values)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return direct(*values)  # type: ignore[no-any-return]


def laid_out(problem: Problem) -> Problem:
    """Dtypes and layouts as backends need them; what is not a tensor passes through, for the checks to name."""
    query = problem.query
    if not isinstance(query, Tensor) or query.ndim != 3:
        return problem
    changes: dict[str, Any] = {}
    for name in ("query", "key", "value"):
        t = getattr(problem, name)
        if isinstance(t, Tensor) and t.ndim == 3:
            t = cast(t)
            changes[name] = t if t.layout != torch.strided or t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    for name in _INDICES:
        if isinstance(t := getattr(problem, name), Tensor):
            changes[name] = t.contiguous()
    wide = torch.float64 if changes["query"].dtype == torch.float64 else torch.float32
    if isinstance(problem.key_bias, Tensor) and problem.key_bias.is_floating_point():
        changes["key_bias"] = problem.key_bias.to(wide)
    for name in problem.limits:
        if isinstance(number := getattr(problem, name), numbers.Real) and not isinstance(number, bool):
            changes[name] = float_of(number)
    if not problem.dropout_p:
        changes["dropout_seed"] = None
    return problem.replace(**changes)


def prepare(problem: Problem) -> Problem:
    """A problem as backends take it, checked."""
    prepared = laid_out(problem)
    if not is_compiling():  # while tracing, the operator's fake checks
        checks.check_shapes(prepared)
        if readable(prepared.cu_seqlens_q):
            checks.check_contents(prepared)
    return prepared


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Any:
    """(1,) int64 on ``device``; drawn from torch's generator when None."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    return seed.reshape(-1) if isinstance(seed, Tensor) else seed
