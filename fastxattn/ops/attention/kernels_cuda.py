"""Host side of the CUDA attention kernels: allocates, decides schedule and alignment, launches. Never synchronises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem

CUT_ROWS, CUT_LENGTH, CHUNK_KEYS = 64, 1024, 512
"""Of csrc/attention/attention_cuda.h: a sequence's keys are cut where it has at most so many rows (queries x group) and
at least so many keys, into chunks of at least so many. The kernels decide; the host only knows whether one can."""


@dataclass(frozen=True)
class Plan:
    """A problem and what its launches are derived from: shapes and strides, never contents."""

    problem: Problem
    aligned: bool
    """Whether every row may be copied in pieces of 16 bytes."""
    chunks: int
    """Places for the results of chunks of keys; 0: no sequence is long enough."""

    @staticmethod
    def of(problem: Problem, grad_out: Tensor | None = None) -> Plan:
        """``grad_out`` counts for the alignment of backward, which never cuts the keys."""
        p = problem
        chunks = p.slots_k // CHUNK_KEYS if grad_out is None and p.slots_k >= CUT_LENGTH else 0
        tensors = [t for t in (p.query, p.key, p.value, grad_out) if t is not None]
        return Plan(problem, all(map(_in_pieces, tensors)), chunks)

    @property
    def empty(self) -> bool:
        """Whether nothing is to be computed: results are what :meth:`results` and :meth:`gradients` start with."""
        p = self.problem
        return not (p.query.numel() and p.key.shape[0] and p.value.shape[2] and p.batch)

    def results(self) -> tuple[Tensor, Tensor]:
        """Out and lse as rows without a slot keep them."""
        query = self.problem.query
        rows, heads = query.shape[:2]
        out = query.new_zeros(rows, heads, self.problem.value.shape[2])
        return out, query.new_full((heads, rows), -torch.inf, dtype=torch.float32)

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Memory for the chunks' results."""
        if self.chunks == 0:
            return None, None
        p = self.problem
        kv_heads = p.key.shape[1]
        shape = self.chunks, kv_heads, min(CUT_ROWS, p.slots_q * p.group)
        out = p.query.new_empty(*shape, p.value.shape[2], dtype=torch.float32)
        return out, p.query.new_empty(shape, dtype=torch.float32)

    def gradients(self, needs: int) -> dict[str, Tensor | None]:
        """What backward writes, by its name in the kernels; those of keys are by slot (see :func:`sum_by_row`)."""
        p = self.problem
        rows, heads = p.query.shape[:2]
        kv_heads, slots = p.key.shape[1], p.slots_k
        exact = p.query.dtype == torch.float32

        def zeros(name: str, *shape: int) -> Tensor | None:
            like = getattr(p, name)
            return like.new_zeros(shape) if needs & p.bits[name] and like is not None else None

        columns = heads if p.key_bias is not None and p.key_bias.ndim == 2 else kv_heads
        return {
            "grad_query": zeros("query", *p.query.shape),
            "grad_key": zeros("key", slots, kv_heads, p.key.shape[2]),
            "grad_value": zeros("value", slots, kv_heads, p.value.shape[2]),
            "grad_key_bias": zeros("key_bias", slots, columns),
            "delta": p.query.new_empty(heads, rows, dtype=torch.float32),
            "norm": p.query.new_empty(heads, rows, dtype=torch.float32) if exact else None,
        }


def _in_pieces(t: Tensor) -> bool:
    width = 16 // t.element_size()
    strides = (t.stride(axis) for axis in (0, 1) if t.shape[axis] > 1)
    return t.shape[2] % width == 0 and t.data_ptr() % 16 == 0 and all(s % width == 0 for s in strides)


def sum_by_row(problem: Problem, grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The gradients by row, of those that were asked for; several slots may stand for one row."""
    found: dict[str, Tensor] = {}
    for name in ("query", "key", "value", "key_bias"):
        grad, like = grads.get(f"grad_{name}"), getattr(problem, name)
        if grad is None:
            continue
        if name == "key_bias" and like.ndim == 1:
            grad = grad.sum(1)
        if name != "query" and problem.key_index is not None:
            by_row = torch.zeros(like.shape, dtype=grad.dtype, device=grad.device)
            grad = by_row.index_add_(0, problem.key_index.clamp(0, like.shape[0] - 1), grad)
        found[name] = grad
    return found


def _problem(problem: Problem) -> Problem:
    """Last axes made contiguous."""
    rows = {n: t for n in ("query", "key", "value") if (t := getattr(problem, n)).stride(-1) != 1 and t.shape[-1] > 1}
    return problem.replace(**{name: t.contiguous() for name, t in rows.items()})


def _fields(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    """The problem in the order of the launch operators, which know neither bias nor dropout."""
    return *(getattr(problem, n) for n in Problem.names if n not in ("bias", "dropout_p", "dropout_seed")), plan.aligned


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``fastxattn::attention_cuda``; see :mod:`fastxattn.ops.attention.operator`."""
    problem = _problem(Problem.of(arguments))
    plan = Plan.of(problem)
    out, lse = plan.results()
    if not plan.empty:
        with torch.cuda.device(problem.query.device):
            torch.ops.fastxattn.attention_cuda_launch(out, lse, *plan.parts(), *_fields(problem, plan))
    return out, lse


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastxattn::attention_backward_cuda``; the last argument is ``needs``."""
    *fields, needs = arguments
    problem = _problem(Problem.of(fields))
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    plan = Plan.of(problem, grad_out)
    grads = plan.gradients(needs)
    if not plan.empty:
        with torch.cuda.device(problem.query.device):
            torch.ops.fastxattn.attention_backward_cuda_launch(
                *grads.values(), grad_out, grad_lse, out.contiguous(), lse.contiguous(), *_fields(problem, plan)
            )
    found = sum_by_row(problem, grads)
    none = problem.query.new_empty(0)
    return tuple(found.get(name, none) for name in Problem.bits)  # type: ignore[return-value]
