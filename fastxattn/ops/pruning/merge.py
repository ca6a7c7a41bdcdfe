"""Merging of tokens that are not kept into those that are.

Each function takes a selection (or makes one) and returns a selection with an assignment and weights;
``Selection.reduce`` then averages, ``Selection.sizes`` counts, ``Selection.scatter_back`` undoes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.checks import check_offsets
from fastxattn.ops.pruning import checks, segments
from fastxattn.ops.pruning.api import select_tokens
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.problem import Match
from fastxattn.ops.pruning.selection import Selection


def _keep_where(keep: Tensor, cu_seqlens: Tensor, scores: Tensor | None = None, backend: str = "auto") -> Selection:
    """The selection of exactly the tokens with ``keep`` (total,) bool; ``scores`` only rank them."""
    counts = segments.segment_count(keep, cu_seqlens).to(torch.int32)
    return select_tokens(
        keep.float() if scores is None else scores, cu_seqlens, counts, protected=keep, backend=backend
    )


def _counts(name: str, counts: int | Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) int32 of a number for every sequence, or of (batch,) int32 numbers."""
    if isinstance(counts, int) and not isinstance(counts, bool):
        if counts < 0:
            raise ValueError(f"{name} must not be negative; got {counts}")
        return torch.full_like(cu_seqlens[1:], min(counts, 2**31 - 1))
    if not isinstance(counts, Tensor):
        raise TypeError(f"{name} must be an int or an int32 tensor (batch,); got {type(counts).__name__}")
    checks.check_vector(name, counts, cu_seqlens.shape[0] - 1, torch.int32)
    checks.check_device(name, counts, "cu_seqlens", cu_seqlens)
    return counts


def _check_features(features: Tensor, selection: Selection) -> None:
    checks.check_rows("features", features, selection.assignment.shape[0])
    checks.check_device("features", features, "the selection", selection.assignment)


def _rows_where(keep: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with ``keep`` (total,) bool, ascending, and their (batch + 1,) offsets."""
    chosen = _keep_where(keep, cu_seqlens)
    return chosen.keep_index, chosen.cu_seqlens


def best_match(
    features: Tensor, a_index: Tensor, cu_a: Tensor, b_index: Tensor, cu_b: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """For each row of A the most similar row of B of its sequence, without a similarity matrix in memory.

    Args:
        features: (total, channels); similarity is the cosine, 0 for a zero row, NaN for a row that is not finite.
        a_index, b_index: int32 rows of ``features``, grouped by sequence.
        cu_a, cu_b: (batch + 1,) int32 offsets of the groups.
        backend: auto, cpu, triton, cuda or reference.

    Returns:
        ``best`` int32 rows of ``features`` (-1 without a B) and float32 ``similarity``. Ties go to the first in B.
    """
    checks.check_rows("features", features)
    if features.ndim != 2:
        raise ValueError(f"features must have shape (total, channels); got {tuple(features.shape)}")
    for name, index, offsets in (("a", a_index, cu_a), ("b", b_index, cu_b)):
        checks.check_index(f"{name}_index", index, features.shape[0])
        check_offsets(f"cu_{name}", offsets, index.shape[0])
        checks.check_device(f"{name}_index", index, "features", features)
        checks.check_device(f"cu_{name}", offsets, "features", features)
    if cu_a.shape != cu_b.shape:
        raise ValueError(f"cu_b must have the shape of cu_a, {tuple(cu_a.shape)}; got {tuple(cu_b.shape)}")
    rows = features.detach().contiguous()
    best, similarity = run(Match(x=rows, a_index=a_index, cu_a=cu_a, b_index=b_index, cu_b=cu_b), backend)
    return best, similarity


def bipartite(
    features: Tensor,
    cu_seqlens: Tensor,
    merges: int | Tensor,
    *,
    sizes: Tensor | None = None,
    protected: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """One step of token merging: ToMe, Bolya et al., ICLR 2023 (arXiv 2210.09461).

    The tokens of each sequence are split in turn into A (its even places among unprotected tokens) and B (odd); each of
    A is matched with its most similar in B, and the ``merges`` best matches are merged, weighted by ``sizes``.

    Args:
        features: (total, channels) that similarity is measured on (ToMe: the mean of the keys over heads).
        cu_seqlens: (batch + 1,) int32.
        merges: tokens to merge away in each sequence, or (batch,) int32; at most half of the unprotected ones.
        sizes: (total,) float32 tokens that each token already stands for; 1 when None.
        protected: (total,) bool: neither merged nor merged into.
        backend: auto, cpu, triton, cuda or reference.
    """
    checks.check_rows("features", features)
    total = features.shape[0]
    check_offsets("cu_seqlens", cu_seqlens, total)
    wanted = _counts("merges", merges, cu_seqlens)
    for name, vector, dtype in (("sizes", sizes, None), ("protected", protected, torch.bool)):
        if vector is not None:
            checks.check_per_token(name, vector, features, dtype)
    free = segments.inside(cu_seqlens, total)
    if protected is not None:
        free = free & ~protected
    # Places among the free tokens of a sequence: even ones are A, odd ones B.
    running = torch.nn.functional.pad(free.cumsum(0), (1, 0))
    starts = running[torch.nn.functional.pad(cu_seqlens[:-1], (0, 1)).long()]
    place = running[:-1] - starts[segments.sequence_ids(cu_seqlens, total)]
    a_index, cu_a = _rows_where(free & (place % 2 == 0), cu_seqlens)
    b_index, cu_b = _rows_where(free & (place % 2 == 1), cu_seqlens)
    best, similarity = best_match(features, a_index, cu_a, b_index, cu_b, backend=backend)
    wanted = torch.where(cu_b.diff() > 0, torch.minimum(wanted, cu_a.diff()), 0)
    merged = select_tokens(similarity, cu_a, wanted, backend=backend).assignment >= 0  # of A
    gone = segments.scattered(a_index, merged, total, False)
    kept = _keep_where(segments.inside(cu_seqlens, total) & ~gone, cu_seqlens, backend=backend)
    target = segments.scattered(a_index, best, total, -1)
    if sizes is None:
        sizes = torch.ones(total, dtype=torch.float32, device=features.device)
    return _join(kept, gone, target, sizes.float())


def _join(kept: Selection, joins: Tensor, target: Tensor, weight: Tensor) -> Selection:
    """``kept`` with the tokens of ``joins`` (total,) averaged into the rows that ``target`` (total,) names."""
    if kept.assignment.shape[0] == 0:
        return kept.merged(kept.assignment, weight)
    through = kept.assignment[target.clamp_min(0).long()]
    return kept.merged(torch.where(joins & (target >= 0), through, kept.assignment), weight)


def nearest(
    selection: Selection, features: Tensor, *, weight: Tensor | None = None, backend: str = "auto"
) -> Selection:
    """Merge every dropped token into the most similar kept one (PruMerge, Shang et al. 2024, arXiv 2403.15388).

    A token that is not finite, or that finds only kept tokens that are not, stays dropped.

    Args:
        selection: what is kept.
        features: (total, channels) that similarity is measured on.
        weight: (total,) float32 of the average: attention received, in PruMerge; equal when None.
        backend: auto, cpu, triton, cuda or reference.
    """
    _check_features(features, selection)
    if weight is not None:
        checks.check_per_token("weight", weight, features)
    cu_seqlens, total = selection.source_cu_seqlens, selection.assignment.shape[0]
    # A token that is not finite would spoil the average it joined; it stays dropped.
    dropped = (selection.assignment < 0) & segments.inside(cu_seqlens, total) & features.isfinite().all(1)
    a_index, cu_a = _rows_where(dropped, cu_seqlens)
    best, likeness = best_match(features, a_index, cu_a, selection.keep_index, selection.cu_seqlens, backend=backend)
    target = segments.scattered(a_index, torch.where(likeness.isnan(), -1, best), total, -1)
    return _join(selection, dropped, target, torch.ones_like(selection.scores) if weight is None else weight.float())


def contextual(dominant: Selection, features: Tensor, count: int | Tensor, *, backend: str = "auto") -> Selection:
    """Keep ``count`` evenly spaced leftovers besides the dominant tokens; the other leftovers merge into the nearest.

    VisionZip, Yang et al., CVPR 2025 (arXiv 2412.04467). The result keeps dominant and contextual tokens in order.
    ``count`` is one number for every sequence, or (batch,) int32.
    """
    _check_features(features, dominant)
    counts = _counts("count", count, dominant.source_cu_seqlens)
    cu_seqlens, total = dominant.source_cu_seqlens, dominant.assignment.shape[0]
    left = (dominant.assignment < 0) & segments.inside(cu_seqlens, total) & features.isfinite().all(1)
    left_index, cu_left = _rows_where(left, cu_seqlens)
    context = segments.scattered(left_index, even_spacing(cu_left, left_index.shape[0], counts), total, False)
    kept = _keep_where(context | (dominant.assignment >= 0), cu_seqlens, dominant.scores, backend)
    a_index, cu_a = _rows_where(left & ~context, cu_seqlens)
    b_index, cu_b = _rows_where(context, cu_seqlens)
    best, _ = best_match(features, a_index, cu_a, b_index, cu_b, backend=backend)
    target = segments.scattered(a_index, best, total, -1)
    return _join(kept, left & ~context, target, torch.ones_like(dominant.scores))


def even_spacing(cu_seqlens: Tensor, total: int, counts: Tensor) -> Tensor:
    """(total,) bool: ``counts`` (batch,) evenly spaced tokens of each sequence, all where it has fewer."""
    length = segments.spread(cu_seqlens.diff().long(), cu_seqlens, total)
    place = torch.arange(total, device=cu_seqlens.device) - segments.spread(cu_seqlens[:-1], cu_seqlens, total)
    k = torch.minimum(length, segments.spread(counts.long(), cu_seqlens, total))
    # Token i is taken where floor((i + 1) k / n) steps up.
    return (place + 1) * k // length.clamp_min(1) > place * k // length.clamp_min(1)


def leftover(selection: Selection, *, average: bool = False, backend: str = "auto") -> Selection:
    """One more kept token per sequence that stands for everything dropped: EViT, Liang et al., ICLR 2022.

    The row of the leftover is ``sum_i score_i * x_i`` over the dropped tokens, as in the paper (arXiv 2202.07800, where
    the scores are attention and sum to less than 1). With ``average`` it is divided by the sum of these scores, for
    scores of any size. NaN and negative scores count as 0. The best dropped token gives the leftover its place, so that
    order and positions stay meaningful (the paper appends it). A sequence that dropped nothing gets none.
    """
    cu_seqlens = selection.source_cu_seqlens
    counts = torch.minimum(selection.cu_seqlens.diff() + 1, cu_seqlens.diff())
    kept = select_tokens(selection.scores, cu_seqlens, counts, protected=selection.protected, backend=backend)
    total = selection.assignment.shape[0]
    sequence, inside = segments.sequence_ids(cu_seqlens, total), segments.inside(cu_seqlens, total)
    seat = inside & (kept.assignment >= 0) & (selection.assignment < 0)
    places = torch.full((cu_seqlens.shape[0],), -1, dtype=torch.int32, device=seat.device)
    places = places.scatter_reduce(0, sequence, torch.where(seat, kept.assignment, -1), "amax")
    joins = inside & (selection.assignment < 0) & ~selection.scores.isnan()
    assignment = torch.where(joins, places[sequence], kept.assignment)
    weight = torch.where(selection.assignment >= 0, 1.0, selection.scores)
    return kept.merged(assignment, weight, average=average)
