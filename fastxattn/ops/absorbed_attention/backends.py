"""Backends of absorbed attention: their order, what each supports, how each runs, and the fast path on the CPU."""

from __future__ import annotations

import functools
import numbers

import torch
from torch import Tensor

from fastxattn.ops.absorbed_attention.checks import check
from fastxattn.ops.absorbed_attention.operator import FORWARD, AbsorbedAttention
from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.absorbed_attention.reference import absorbed_attention_reference
from fastxattn.runtime import fast_path, reasons
from fastxattn.runtime.backend import Backend
from fastxattn.runtime.operators import apply


def supports_cpu(problem: Problem) -> str | None:
    """Why the C++ kernel does not run this problem; None when it does."""
    if problem.key_bias is not None and problem.key_bias.ndim == 2:
        return "it needs key_bias of shape (total_k,), one number for all heads"
    return reasons.cpu(problem.query)


def _cpu(problem: Problem) -> tuple[Tensor, Tensor]:
    return apply(AbsorbedAttention, FORWARD, "cpu", problem)[:2]  # type: ignore[no-any-return]


BACKENDS = (
    Backend("cpu", supports_cpu, _cpu),
    Backend("reference", lambda problem: None, absorbed_attention_reference),
)


def run(problem: Problem, key_index: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Out and lse; ``key_index`` are the rows that the sequences consist of, all when None."""
    return fast_path.dispatch(
        "absorbed_attention",
        BACKENDS,
        problem,
        backend,
        fast=_fast if key_index is None else lambda problem: None,
        prepare=functools.partial(prepare, key_index),
    )


def _fast(problem: Problem) -> tuple[Tensor, Tensor] | None:
    query = problem.query
    sound = query.dtype != torch.float64 and query.numel() and problem.plain_numbers()
    return _cpu(problem) if sound else None


def prepare(key_index: Tensor | None, problem: Problem) -> Problem:
    """Checked, in the layouts that backends take, with the rows of ``key_index`` gathered."""
    check(problem, key_index)
    query, context, key_bias = problem.query, problem.context, problem.key_bias
    if key_index is not None:
        # All heads and queries of a sequence use every row: gathering costs little beside that.
        context = context.index_select(0, key_index)
        key_bias = None if key_bias is None else key_bias.index_select(0, key_index)
    wide = torch.promote_types(query.dtype, torch.float32)
    ranges, scale = problem.kv_range, problem.scale
    return problem.replace(
        query=query if query.stride(2) == 1 else query.contiguous(),
        context=context.contiguous(),
        cu_seqlens_q=problem.cu_seqlens_q.contiguous(),
        cu_seqlens_k=problem.cu_seqlens_k.contiguous(),
        kv_range=None if ranges is None else ranges.contiguous(),
        key_bias=None if key_bias is None else key_bias.to(wide).contiguous(),
        scale=float(scale) if isinstance(scale, numbers.Real) else scale,  # else symbolic, of a traced program
    )
