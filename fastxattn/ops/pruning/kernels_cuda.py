"""CUDA kernels of pruning: selection with its gather in one launch, matching, merging."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.pruning.problem import Match, Merge, Select
from fastxattn.ops.pruning.reference import kept_offsets
from fastxattn.ops.pruning.segments import inverse_norms, members_by_row
from fastxattn.runtime import cuda

SHARES = 4
"""Blocks that divide the rows gathered of one sequence, or its tiles of 64 rows to match."""


def select(p: Select) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the selection, and the gather of the rows that it kept."""
    scores, x = p.scores, p.x
    cu_keep = kept_offsets(p.cu_seqlens, p.counts, p.capacity)
    keep_index = torch.empty(p.capacity, dtype=torch.int32, device=scores.device)
    assignment = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
    gathered = scores.new_empty(0) if x is None else x.new_empty(p.capacity, x.shape[1])
    guard = None if p.protected is None else p.protected.to(torch.uint8)
    results = (keep_index, assignment, None if x is None else gathered)
    tail = (False, 1) if x is None else (cuda.aligned(x, gathered), SHARES)
    cuda.launch("pruning_select", *results, scores, p.cu_seqlens, cu_keep, guard, x, *tail)
    return keep_index, cu_keep, assignment, gathered


def merge(p: Merge) -> Tensor:
    """Launch the sums of rows, members of each in ascending order."""
    out = p.x.new_empty(p.rows, p.x.shape[1])
    if out.numel():
        cuda.launch("pruning_merge", out, p.x, *members_by_row(p.assignment, p.rows), p.coefficient)
    return out


def match(p: Match) -> tuple[Tensor, Tensor]:
    """Launch the search for the most similar rows."""
    best = torch.full_like(p.a_index, -1)
    similarity = torch.full(p.a_index.shape, torch.nan, dtype=torch.float32, device=p.x.device)
    if p.a_index.shape[0] and p.cu_a.shape[0] > 1:
        rows = (p.a_index, p.cu_a, p.b_index, p.cu_b)
        cuda.launch("pruning_match", best, similarity, p.x, inverse_norms(p.x), *rows, cuda.aligned(p.x), SHARES)
    return best, similarity
