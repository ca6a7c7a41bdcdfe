"""Published pruning strategies, each a few lines over the shared kernels.

A strategy is ``strategy(tokens, cu_seqlens, budget, **what it needs) -> Selection``; :data:`STRATEGIES` lists them by
name. ``tokens`` (total, channels) are packed; ``attention`` (total,) is the attention that each token received, from
:func:`probe_scores` (a row: CLS or the last text token) or :func:`received_scores` (a column sum: no CLS needed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.offsets import check_offsets
from fastxattn.ops.pruning import checks, merge, segments
from fastxattn.ops.pruning.api import select
from fastxattn.ops.pruning.budget import Budget
from fastxattn.ops.pruning.ops import run
from fastxattn.ops.pruning.schema import DETERMINANT, MAX_MIN
from fastxattn.ops.pruning.selection import Selection


def attention_topk(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any
) -> Selection:
    """Keep the most attended tokens.

    With CLS rows: EViT (arXiv 2202.07800), FasterVLM (2412.01818). With the last text token's row inside the language
    model: FastV (2403.06764), and by stages PyramidDrop (2410.17247). With column sums: HiPrune (2508.00553) and
    SparseVLM's text raters (2410.04417).
    """
    return select(attention, cu_seqlens, budget, **options)


def evit(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any) -> Selection:
    """EViT, Liang et al., ICLR 2022 (arXiv 2202.07800): top-k, the rest fused into one more token."""
    return merge.leftover(select(attention, cu_seqlens, budget, **options), backend=options.get("backend", "auto"))


def tome(
    tokens: Tensor,
    cu_seqlens: Tensor,
    budget: Budget,
    *,
    sizes: Tensor | None = None,
    protected: Tensor | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
) -> Selection:
    """ToMe, Bolya et al., ICLR 2023 (arXiv 2210.09461): one bipartite merge; it removes at most half of the tokens."""
    probe = tokens.new_zeros(tokens.shape[0], dtype=torch.float32)
    keep = budget.counts(probe, cu_seqlens, protected, backend=backend)
    return merge.bipartite(
        tokens, cu_seqlens, cu_seqlens.diff() - keep, sizes=sizes, protected=protected, backend=backend
    )


def _greedy(
    tokens: Tensor, quality: Tensor | None, cu_seqlens: Tensor, budget: Budget, mode: int, options: dict[str, Any]
) -> Selection:
    checks.check_rows("tokens", tokens)
    check_offsets("cu_seqlens", cu_seqlens, tokens.shape[0])
    if not budget.static:
        raise ValueError(f"budget must be static (count, ratio, total) for a greedy search; got {budget.kind}")
    backend, protected = options.get("backend", "auto"), options.get("protected")
    counts = budget.counts(tokens.new_zeros(tokens.shape[0], dtype=torch.float32), cu_seqlens, None, backend=backend)
    most = budget.per_sequence(tokens.shape[0], options.get("max_seqlen"))
    flat = tokens.detach().flatten(1).contiguous()
    scores = run("greedy", flat, backend, flat, quality, cu_seqlens, counts, protected, mode, most)
    return select(scores, cu_seqlens, budget, **options)


def divprune(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    """DivPrune, Alvar et al., CVPR 2025 (arXiv 2503.02175): greedy max-min diversity in cosine distance."""
    return _greedy(tokens, None, cu_seqlens, budget, MAX_MIN, options)


def cdpruner(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, relevance: Tensor | None = None, **options: Any
) -> Selection:
    """CDPruner, Zhang et al. 2025 (arXiv 2506.10967): greedy MAP of a determinantal point process.

    The kernel is ``diag(r) S diag(r)`` with S the cosine similarity of tokens and ``r`` their ``relevance`` (total,) to
    an instruction, for example :func:`text_relevance`; unconditioned when None.
    """
    quality = None if relevance is None else relevance.detach().float().contiguous()
    if quality is not None:
        checks.check_vector("relevance", quality, tokens.shape[0], torch.float32)
    return _greedy(tokens, quality, cu_seqlens, budget, DETERMINANT, options)


def visionzip(
    tokens: Tensor,
    cu_seqlens: Tensor,
    budget: Budget,
    *,
    attention: Tensor,
    contextual: int | None = None,
    **options: Any,
) -> Selection:
    """VisionZip, Yang et al., CVPR 2025 (arXiv 2412.04467): dominant tokens by attention, contextual ones by merging.

    ``budget`` must be a count; ``contextual`` of it (a sixth when None, the paper's 10 of 64) are contextual.
    """
    if budget.kind != "count":
        raise ValueError(f"budget must be a count for visionzip; got {budget.kind}")
    few = int(budget.value) // 6 if contextual is None else contextual
    if few > budget.value:
        raise ValueError(f"contextual must be at most the budget, {int(budget.value)}; got {few}")
    dominant = select(attention, cu_seqlens, Budget.count(int(budget.value) - few), **options)
    return merge.contextual(dominant, tokens, few, backend=options.get("backend", "auto"))


def prumerge(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget | None = None, *, attention: Tensor, **options: Any
) -> Selection:
    """LLaVA-PruMerge, Shang et al. 2024 (arXiv 2403.15388): keep attention outliers, merge the rest into the nearest.

    Without a ``budget`` the number of outliers decides (``Budget.adaptive``), differently for every image.
    """
    kept = select(attention, cu_seqlens, Budget.adaptive() if budget is None else budget, **options)
    return merge.nearest(kept, tokens, weight=attention, backend=options.get("backend", "auto"))


def random_tokens(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, seed: int = 0, **options: Any) -> Selection:
    """Baseline: a random subset; the same one for a seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens.shape[0], generator=generator).to(tokens.device)
    return select(scores, cu_seqlens, budget, **options)


def _grid_places(
    cu_seqlens: Tensor, total: int, columns: int | Tensor, protected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(total,) float64 row and column of each token in its image's grid of patches; protected tokens stand outside."""
    sequence = segments.sequence_ids(cu_seqlens, total)
    counted = torch.ones(total, dtype=torch.int64, device=cu_seqlens.device)
    if protected is not None:
        counted = (~protected).to(torch.int64)
    before = torch.nn.functional.pad(counted.cumsum(0), (1, 0))[:-1]
    start = torch.nn.functional.pad(before, (0, 1))[torch.nn.functional.pad(cu_seqlens[:-1], (0, 1)).long()]
    width = torch.as_tensor(columns, device=cu_seqlens.device).expand(cu_seqlens.shape[0] - 1)
    width = torch.nn.functional.pad(width, (0, 1), value=1)[sequence]
    place = before - start[sequence]
    return (place // width).double(), (place % width).double()


def uniform_grid(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, columns: int | Tensor | None = None, **options: Any
) -> Selection:
    """Baseline: evenly spread tokens; in sequence order, or with ``columns`` over the grid of patches.

    ``columns`` is the width of each image's grid (one int, or (batch,) of them; row-major patches, protected tokens not
    counted). Any number of patches is then spread over both axes by a lattice (the fractional part of two irrational
    steps), where every n-th in sequence order would keep whole columns.
    """
    total = tokens.shape[0]
    if columns is not None:
        row, column = _grid_places(cu_seqlens, total, columns, options.get("protected"))
        return select((row * 0.7548776662466927 + column * 0.5698402909980532) % 1, cu_seqlens, budget, **options)
    zeros = tokens.new_zeros(total, dtype=torch.float32)
    counts = budget.counts(zeros, cu_seqlens, None, backend=options.get("backend", "auto"))
    return select(merge.even_spacing(cu_seqlens, total, counts).float(), cu_seqlens, budget, **options)


def average_pool(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, columns: int | Tensor | None = None, **options: Any
) -> Selection:
    """Baseline: evenly spread tokens become the average of their neighbourhood; all tokens count.

    Without ``columns`` the token at the end of each run of neighbours stands for the run (1-D pooling); with it each
    patch joins the nearest kept one of the grid (2-D pooling for any budget).
    """
    kept = uniform_grid(tokens, cu_seqlens, budget, columns=columns, **options)
    finite = tokens.detach().flatten(1).isfinite().all(1) | (kept.assignment >= 0)
    if columns is not None:
        # Places on a sphere of large radius: the highest cosine is the smallest distance.
        row, column = _grid_places(cu_seqlens, tokens.shape[0], columns, options.get("protected"))
        place = torch.stack([row, column, torch.full_like(row, 64.0)], 1).float()
        if (protected := options.get("protected")) is not None:
            place = torch.where(protected[:, None], place * 0, place)  # no patch is near a CLS token
        place = torch.where(finite[:, None], place, torch.nan)
        return merge.nearest(kept, place, backend=options.get("backend", "auto"))
    before = torch.nn.functional.pad((kept.assignment >= 0).cumsum(0), (1, 0))[:-1].to(torch.int32)
    row = segments.sequence_ids(cu_seqlens, tokens.shape[0])
    last = torch.nn.functional.pad(kept.cu_seqlens[1:], (0, 1))[row]
    first = torch.nn.functional.pad(kept.cu_seqlens[:-1], (0, 1))[row]
    place = torch.where(last > first, torch.minimum(before, last - 1), -1).to(torch.int32)
    return kept.merged(torch.where(finite, place, -1), torch.ones_like(kept.scores))


def norm(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    """Baseline: the longest token vectors."""
    return select(tokens.detach().float().flatten(1).norm(dim=1), cu_seqlens, budget, **options)


STRATEGIES: dict[str, Callable[..., Selection]] = {
    "attention": attention_topk,
    "evit": evit,
    "tome": tome,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "random": random_tokens,
    "uniform": uniform_grid,
    "pool": average_pool,
    "norm": norm,
}
NEEDS_ATTENTION = frozenset({"attention", "evit", "visionzip", "prumerge"})
TAKES_COLUMNS = frozenset({"uniform", "pool"})
TAKES_SIZES = frozenset({"tome"})
