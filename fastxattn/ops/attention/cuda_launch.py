"""Host side of the CUDA attention kernels: allocates, decides schedule and alignment, launches. Never synchronises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.attention.triton.config import SPLIT_KEYS, splits_for


@dataclass(frozen=True)
class Plan:
    """A problem and what its launches are derived from."""

    problem: Problem
    aligned: bool
    """Whether every row may be copied in pieces of 16 bytes."""
    splits: int
    """Chunks of keys per sequence; 1: not cut."""
    split_keys: int = SPLIT_KEYS
    """Least keys per chunk."""

    @staticmethod
    def of(problem: Problem, grad_out: Tensor | None = None) -> Plan:
        """``grad_out`` counts for the alignment of backward, which never cuts the keys."""
        p = problem
        group = p.query.shape[1] // max(p.key.shape[1], 1)
        slots_q, slots_k = (
            t.shape[0] if index is None else index.numel()
            for t, index in ((p.query, p.query_index), (p.key, p.key_index))
        )
        splits = 1 if grad_out is not None else splits_for(slots_q, slots_k, p.cu_seqlens_q.numel() - 1, group)
        tensors = [t for t in (p.query, p.key, p.value, grad_out) if t is not None]
        return Plan(problem, all(map(_in_pieces, tensors)), splits)

    def results(self) -> tuple[Tensor, Tensor]:
        """Out and lse as rows without a slot keep them."""
        query = self.problem.query
        rows, heads = query.shape[:2]
        out = query.new_zeros(rows, heads, self.problem.value.shape[2])
        return out, query.new_full((heads, rows), -torch.inf, dtype=torch.float32)

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Room for the chunks' results, when keys are cut."""
        if self.splits == 1:
            return None, None
        query = self.problem.query
        rows, heads = query.shape[:2]
        shape = (self.splits, rows, heads, self.problem.value.shape[2])
        return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape[0], heads, rows, dtype=torch.float32)

    def gradients(self, wanted: set[str]) -> dict[str, Tensor | None]:
        """What backward writes, by its name in the kernels; those of keys are by slot (see :func:`sum_by_row`)."""
        p = self.problem
        rows, heads = p.query.shape[:2]
        slots = p.key.shape[0] if p.key_index is None else p.key_index.numel()
        grads: dict[str, Tensor | None] = {
            "grad_query": torch.zeros_like(p.query, memory_format=torch.contiguous_format) if "query" in wanted else None,
            "grad_key": p.key.new_zeros(slots, *p.key.shape[1:]) if "key" in wanted else None,
            "grad_value": p.value.new_zeros(slots, *p.value.shape[1:]) if "value" in wanted else None,
            "grad_key_bias": None,
            "delta": p.query.new_empty(heads, rows, dtype=torch.float32),
            "norm": p.query.new_empty(heads, rows, dtype=torch.float32) if p.query.dtype == torch.float32 else None,
        }  # fmt: skip
        if "key_bias" in wanted and p.key_bias is not None:
            columns = heads if p.key_bias.ndim == 2 else p.key.shape[1]
            grads["grad_key_bias"] = p.key_bias.new_zeros(slots, columns)
        return grads


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
