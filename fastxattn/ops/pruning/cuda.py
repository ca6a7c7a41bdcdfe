"""The CUDA C++ kernels as a backend: selection with its gather in one launch, matching, merging."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.pruning import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.pruning.reference import kept_offsets
from fastxattn.ops.pruning.segments import inverse_norms, members_by_row
from fastxattn.runtime import cuda

SHARES = 4
"""Blocks that divide the rows gathered of one sequence, or its tiles of 64 rows to match."""


def supports(x: Tensor) -> str | None:
    """None when the CUDA kernels take tokens like ``x``, else why not."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; got {x.dtype}"
    return cuda.unavailable(x.device)


def select(
    scores: Tensor, cu_seqlens: Tensor, counts: Tensor, protected: Tensor | None, x: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the schema says."""
    cu_keep = kept_offsets(cu_seqlens, counts, capacity)
    keep_index = torch.empty(capacity, dtype=torch.int32, device=scores.device)
    assignment = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
    gathered = scores.new_empty(0) if x is None else x.new_empty(capacity, x.shape[1])
    guard = None if protected is None else protected.to(torch.uint8)
    cuda.launch(
        "pruning_select", keep_index, assignment, None if x is None else gathered, scores, cu_seqlens, cu_keep, guard,
        x, x is not None and cuda.aligned(x, gathered), 1 if x is None else SHARES,
    )  # fmt: skip
    return keep_index, cu_keep, assignment, gathered


def merge(x: Tensor, assignment: Tensor, coefficient: Tensor | None, rows: int) -> Tensor:
    """As the schema says."""
    out = x.new_empty(rows, x.shape[1])
    if out.numel():
        cuda.launch("pruning_merge", out, x, *members_by_row(assignment, rows), coefficient)
    return out


def match(x: Tensor, a_index: Tensor, cu_a: Tensor, b_index: Tensor, cu_b: Tensor) -> tuple[Tensor, Tensor]:
    """As the schema says."""
    best = torch.full_like(a_index, -1)
    similarity = torch.full(a_index.shape, torch.nan, dtype=torch.float32, device=x.device)
    if a_index.shape[0] and cu_a.shape[0] > 1:
        cuda.launch(
            "pruning_match", best, similarity, x, inverse_norms(x), a_index, cu_a, b_index, cu_b, cuda.aligned(x),
            SHARES,
        )  # fmt: skip
    return best, similarity


for _function in (select, merge, match):
    torch.library.impl(f"fastxattn::pruning_{_function.__name__}_cuda", "CUDA", _function)
