"""Selection of tokens by scores and a budget, with or without the kept rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.checks import readable
from fastxattn.ops.pruning import checks
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.budget import Budget, counts_of
from fastxattn.ops.pruning.problem import Select
from fastxattn.ops.pruning.reference import kept_offsets
from fastxattn.ops.pruning.rows import gather_rows
from fastxattn.ops.pruning.selection import Selection
from fastxattn.runtime import env
from fastxattn.runtime.operators import derivative_wanted


def select_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    budget: Budget | Tensor,
    *,
    protected: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Selection:
    """Keep the best tokens of each sequence, in their order.

    Best first: protected tokens, then numbers before NaN, then the higher score (-0 equals 0), then the lower index.
    Each sequence is decided by itself (only ``Budget.total`` looks across them). ``k = 0`` keeps nothing, ``k`` above
    the length everything; with more protected tokens than ``k`` the best of them stay. Every backend keeps the
    same tokens.

    Args:
        scores: (total,) floating point, ranked in float32. No gradient flows through ranking.
        cu_seqlens: (batch + 1,) int32: sequence b is rows ``cu_seqlens[b] : cu_seqlens[b + 1]``.
        budget: a :class:`Budget`, or (batch,) int32 counts.
        protected: (total,) bool: tokens such as CLS and registers that outrank all others.
        max_seqlen: a bound on the lengths; makes the static size of a ratio exact for equal lengths.
        backend: auto, cpu, triton, cuda or reference.

    Returns:
        The selection; its size is exact on the CPU, and elsewhere a bound that needs no synchronisation.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or offset is wrong.

    Example:
        >>> cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
        >>> kept = select_tokens(torch.tensor([0.1, 0.9, 0.5]), cu_seqlens, Budget.count(2))
        >>> kept.keep_index.tolist(), kept.rank.tolist()
        ([1, 2], [0, 1])
    """
    return _select(scores, cu_seqlens, budget, protected, max_seqlen, backend, None)[0]


def prune_tokens(
    x: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    budget: Budget | Tensor,
    *,
    protected: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Selection]:
    """Keep the best tokens as :func:`select_tokens` does, and gather their rows of ``x`` in the same call.

    Args:
        x: (total, ...) floating point. Differentiable.
        scores: (total,) as in :func:`select_tokens`, as are the other arguments.
        cu_seqlens: (batch + 1,) int32.
        budget: a :class:`Budget`, or (batch,) int32 counts.
        protected: (total,) bool or None.
        max_seqlen: a bound on the lengths.
        backend: auto, cpu, triton, cuda or reference.

    Returns:
        The kept rows (kept, ...), and the selection.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or offset is wrong.

    Example:
        >>> x, cu_seqlens = torch.arange(6.0).view(3, 2), torch.tensor([0, 3], dtype=torch.int32)
        >>> rows, kept = prune_tokens(x, torch.tensor([0.1, 0.9, 0.5]), cu_seqlens, Budget.count(2))
        >>> rows.tolist(), kept.keep_index.tolist()
        ([[2.0, 3.0], [4.0, 5.0]], [1, 2])
    """
    checks.check_scores(scores, cu_seqlens)
    checks.check_rows("x", x, scores.shape[0])
    checks.check_device("x", x, "scores", scores)
    fused = x.ndim == 2 and x.is_contiguous() and not derivative_wanted(x)
    selection, rows = _select(scores, cu_seqlens, budget, protected, max_seqlen, backend, x if fused else None)
    if not fused:  # the CUDA library gathers only in the launch that selects
        asked = env.default_backend if backend == "auto" else backend
        rows = gather_rows(x, selection.keep_index, backend="triton" if asked == "cuda" else backend)
    return rows, selection


def _select(
    scores: Tensor,
    cu_seqlens: Tensor,
    budget: Budget | Tensor,
    protected: Tensor | None,
    max_seqlen: int | None,
    backend: str,
    x: Tensor | None,
) -> tuple[Selection, Tensor]:
    checks.check_scores(scores, cu_seqlens)
    total, batch = scores.shape[0], cu_seqlens.shape[0] - 1
    if protected is not None:
        checks.check_vector("protected", protected, total, torch.bool)
        checks.check_device("protected", protected, "scores", scores)
    checks.check_max_seqlen(max_seqlen, cu_seqlens)
    ranked = scores.detach().float().contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    counts = counts_of(budget, ranked, cu_seqlens, protected, backend)
    capacity = budget.capacity(total, batch, max_seqlen) if isinstance(budget, Budget) else total
    longest = capacity if max_seqlen is None else min(capacity, max_seqlen)
    if readable(cu_seqlens):
        offsets = kept_offsets(cu_seqlens, counts, capacity)
        capacity = int(offsets[-1])
        longest = int(offsets.diff().max()) if batch else 0
    problem = Select(
        scores=ranked,
        cu_seqlens=cu_seqlens,
        counts=counts,
        protected=None if protected is None else protected.contiguous(),
        x=x,
        capacity=capacity,
    )
    index, cu_keep, assignment, rows = run(problem, backend)
    return Selection(index, cu_keep, assignment, cu_seqlens, longest, ranked, protected), rows
