"""Pruning strategies by name: a table that :func:`register_strategy` fills, and published ones over the shared kernels.

A strategy is ``strategy(tokens, cu_seqlens, budget, **what it needs) -> Selection``; :data:`STRATEGIES` lists them by
name. ``tokens`` (total, channels) are packed; ``attention`` (total,) is the attention that each token received, from
:func:`probe_scores` (a row: CLS or the last text token) or :func:`received_scores` (a column sum: no CLS needed).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.checks import check_offsets, readable
from fastxattn.ops.pruning import checks, merge, segments
from fastxattn.ops.pruning.api import select_tokens
from fastxattn.ops.pruning.backends import run
from fastxattn.ops.pruning.budget import Budget, counts_of
from fastxattn.ops.pruning.problem import DETERMINANT, MAX_MIN, Greedy
from fastxattn.ops.pruning.selection import Selection, check_selection

NEEDS = ("attention", "columns", "sizes")
"""What callers compute for strategies that name it: see :func:`register_strategy`."""
OPTIONS = ("protected", "max_seqlen")
"""What callers pass to every strategy."""


@dataclass(frozen=True)
class Strategy:
    """A pruning strategy by its name; call it as its function, whose result is checked."""

    name: str
    function: Callable[..., Selection]
    needs: tuple[str, ...] = ()

    def __call__(
        self, tokens: Tensor, cu_seqlens: Tensor, budget: Budget | Tensor | None = None, **options: Any
    ) -> Selection:
        """Select tokens.

        Raises:
            TypeError: ``attention`` is missing that the strategy needs, or its result is no selection.
            ValueError: the result breaks a rule of :func:`check_selection`.
        """
        if "attention" in self.needs and options.get("attention") is None:
            raise TypeError(f"strategy {self.name} needs attention, (total,) scores of the tokens; got none")
        selection = self.function(tokens, cu_seqlens, budget, **(dict.fromkeys((*OPTIONS, *self.needs)) | options))
        check_selection(self.name, selection, cu_seqlens, tokens.shape[0], budget, options.get("protected"))
        return selection


class _Table(dict[str, Strategy]):
    def __setitem__(self, name: str, strategy: Strategy) -> None:
        raise TypeError("STRATEGIES is filled by fastxattn.register_strategy(name, function, needs=...)")


STRATEGIES: dict[str, Strategy] = _Table()
"""Every registered strategy by name."""


def register_strategy(
    name: str, function: Callable[..., Selection], *, needs: Sequence[str] = (), replace: bool = False
) -> None:
    """Let :func:`fastxattn.prune_model`, ``nn.TokenPruner`` and ``fastxattn prune`` find a strategy by name.

    Every selection that it makes is checked: it must be of the tokens and sequences given, keep rows in ascending
    order, no more than a budget of counts allows (unless it merges), and no other token in place of a protected one.

    Args:
        name: of the strategy.
        function: ``function(tokens, cu_seqlens, budget, **options) -> Selection`` over packed ``tokens`` (total,
            channels). ``options`` are ``protected`` ((total,) bool or None), ``max_seqlen`` (int or None) and what
            ``needs`` names; pass ``protected`` on to :func:`fastxattn.select_tokens`.
        needs: what the strategy takes besides: "attention" (total,) that each token received; "columns", the width of
            each image's grid of patches, None where it is unknown; "sizes" (total,), how many original tokens each
            stands for, None where that is 1.
        replace: whether ``name`` may be registered already.

    Raises:
        TypeError: ``name`` is not a string or ``function`` not callable.
        ValueError: ``name`` is registered, ``needs`` names something unknown, or ``function`` does not take what it
            will be given, or needs what it will not.

    Example:
        >>> def brightest(tokens, cu_seqlens, budget, **options):
        ...     return fastxattn.select_tokens(tokens.float().mean(1), cu_seqlens, budget, **options)
        >>> fastxattn.register_strategy("brightest", brightest)
        >>> fewer, kept = fastxattn.nn.TokenPruner(0.5, strategy="brightest")(torch.randn(2, 8, 4))
        >>> kept.cu_seqlens.tolist()
        [0, 4, 8]
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {type(name).__name__}")
    if not callable(function):
        raise TypeError(f"function of strategy {name} must be callable; got {type(function).__name__}")
    named = (needs,) if isinstance(needs, str) else tuple(needs)
    if unknown := [n for n in named if n not in NEEDS]:
        raise ValueError(f"needs of strategy {name} must be of {', '.join(NEEDS)}; got {unknown[0]!r}")
    if name in STRATEGIES and not replace:
        raise ValueError(f"name must not be registered already (or pass replace=True); got {name!r}")
    _check_signature(name, function, named)
    dict.__setitem__(STRATEGIES, name, Strategy(name, function, named))


def _check_signature(name: str, function: Callable[..., Selection], needs: tuple[str, ...]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some compiled callables have none
        return
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    given = (*OPTIONS, *needs)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and (lacks := [n for n in given if n not in named]):
        raise ValueError(f"function of strategy {name} must take {lacks[0]}, or **options; got {function!r}")
    required = [p.name for p in named.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if missing := [n for n in required if n not in given]:
        allowed = f"needs must name it (of {', '.join(NEEDS)})" if missing[0] in NEEDS else "give it a default"
        raise ValueError(f"function of strategy {name} has the required argument {missing[0]}: {allowed}")


def find_strategy(name: str) -> Strategy:
    """The registered strategy of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        hint = "" if isinstance(name, str) else "; fastxattn.register_strategy gives a function a name"
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}{hint}")
    return STRATEGIES[name]


def attention_topk(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any
) -> Selection:
    """Keep the most attended tokens.

    With CLS rows: EViT (arXiv 2202.07800), FasterVLM (2412.01818). With the last text token's row inside the language
    model: FastV (2403.06764), and by stages PyramidDrop (2410.17247). With column sums: HiPrune (2508.00553) and
    SparseVLM's text raters (2410.04417).
    """
    return select_tokens(attention, cu_seqlens, budget, **options)


def evit(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, attention: Tensor, **options: Any) -> Selection:
    """EViT, Liang et al., ICLR 2022 (arXiv 2202.07800): top-k, the rest fused into one more token.

    The fused token is ``sum_i a_i x_i`` over the dropped tokens with their raw attention, as in the paper. It sits
    where the best dropped token was; the paper appends it.
    """
    return merge.leftover(
        select_tokens(attention, cu_seqlens, budget, **options), backend=options.get("backend", "auto")
    )


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
    """ToMe, Bolya et al., ICLR 2023 (arXiv 2210.09461): one bipartite merge; it removes at most half of the tokens.

    Similarity is that of ``tokens``. The paper compares keys, averaged over heads: pass those as ``tokens``, and reduce
    the hidden states with the selection.
    """
    checks.check_max_seqlen(max_seqlen, cu_seqlens)
    keep = _counts("tome", tokens, cu_seqlens, budget, backend)
    return merge.bipartite(
        tokens, cu_seqlens, cu_seqlens.diff() - keep, sizes=sizes, protected=protected, backend=backend
    )


def _counts(name: str, tokens: Tensor, cu_seqlens: Tensor, budget: Budget | Tensor, backend: str) -> Tensor:
    """(batch,) int32 counts for the strategy ``name``, which has no scores before it picks."""
    checks.check_rows("tokens", tokens)
    check_offsets("cu_seqlens", cu_seqlens, tokens.shape[0])
    checks.check_device("cu_seqlens", cu_seqlens, "tokens", tokens)
    if isinstance(budget, Budget) and not budget.by_length:
        kind = 'total(by="score")' if budget.static else budget.kind
        raise ValueError(
            f"budget must be static (count, ratio, or total by length) for {name}, which has no scores before it picks "
            f"tokens; got {kind}"
        )
    zeros = tokens.new_zeros(tokens.shape[0], dtype=torch.float32)
    return counts_of(budget, zeros, cu_seqlens, None, backend)


def _greedy(
    name: str,
    tokens: Tensor,
    quality: Tensor | None,
    cu_seqlens: Tensor,
    budget: Budget | Tensor,
    mode: int,
    options: dict[str, Any],
) -> Selection:
    backend, protected = options.get("backend", "auto"), options.get("protected")
    counts = _counts(name, tokens, cu_seqlens, budget, backend)
    if protected is not None:
        checks.check_per_token("protected", protected, tokens, torch.bool)
        protected = protected.contiguous()
    checks.check_max_seqlen(options.get("max_seqlen"), cu_seqlens)
    most = tokens.shape[0]
    if isinstance(budget, Budget):
        most = budget.per_sequence(most, options.get("max_seqlen"))
    flat = tokens.detach().flatten(1).contiguous()
    layout: dict[str, Any] = {"cu_seqlens": cu_seqlens.contiguous(), "counts": counts, "protected": protected}
    scores = run(Greedy(x=flat, quality=quality, **layout, mode=mode, max_count=most), backend)
    return select_tokens(scores, cu_seqlens, budget, **options)


def divprune(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    """DivPrune, Alvar et al., CVPR 2025 (arXiv 2503.02175): greedy max-min diversity in cosine distance."""
    return _greedy("divprune", tokens, None, cu_seqlens, budget, MAX_MIN, options)


def cdpruner(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, relevance: Tensor | None = None, **options: Any
) -> Selection:
    """CDPruner, Zhang et al. 2025 (arXiv 2506.10967): greedy MAP of a determinantal point process.

    The kernel is ``diag(r) S diag(r)`` with S the cosine similarity of tokens and ``r`` their ``relevance`` (total,) to
    an instruction, for example :func:`text_relevance`; unconditioned when None, and in each sequence without a finite
    relevance other than 0. Only ratios of relevance within a sequence matter. Tokens of relevance NaN or infinity are
    picked last.
    """
    quality = None
    if relevance is not None:
        checks.check_rows("tokens", tokens)
        check_offsets("cu_seqlens", cu_seqlens, tokens.shape[0])
        checks.check_per_token("relevance", relevance, tokens)
        quality = _relative(relevance.detach().double(), cu_seqlens)
    return _greedy("cdpruner", tokens, quality, cu_seqlens, budget, DETERMINANT, options)


def _relative(relevance: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(total,) float32 relevance as a share of each sequence's largest; 1 for all tokens of one that has none."""
    finite = torch.where(relevance.isfinite(), relevance.abs(), 0.0)
    largest = segments.spread(segments.segment_max(finite, cu_seqlens), cu_seqlens, relevance.shape[0])
    return torch.where(largest > 0, relevance / torch.where(largest > 0, largest, 1.0), 1.0).float()


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

    ``budget`` must be a count; ``contextual`` of it (a sixth when None, the paper's 10 of 64) are contextual, fewer
    where protected tokens need the places. A contextual token becomes the average of what merges into it; the paper's
    code adds that average to it.
    """
    if not isinstance(budget, Budget):
        counts_of(budget, attention, cu_seqlens, None, "auto")  # names what is wrong with it
    if not isinstance(budget, Budget) or budget.kind != "count":
        got = budget.kind if isinstance(budget, Budget) else "a tensor of counts"
        raise ValueError(f"budget must be a count for visionzip; got {got}")
    count = int(budget.value)
    few = count // 6 if contextual is None else contextual
    if not isinstance(few, int) or isinstance(few, bool):
        raise TypeError(f"contextual must be an int; got {type(few).__name__}")
    if not 0 <= few <= count:
        raise ValueError(f"contextual must lie between 0 and the budget, {count}; got {few}")
    checks.check_scores(attention, cu_seqlens)
    most = budget.counts(attention, cu_seqlens)
    dominant = torch.minimum(most, torch.full_like(most, min(count - few, 2**31 - 1)))
    if (protected := options.get("protected")) is not None:
        checks.check_vector("protected", protected, attention.shape[0], torch.bool)
        guarded = segments.segment_count(protected, cu_seqlens).to(torch.int32)
        dominant = torch.maximum(dominant, torch.minimum(guarded, most))
    kept = select_tokens(attention, cu_seqlens, dominant, **options)
    return merge.contextual(kept, tokens, most - dominant, backend=options.get("backend", "auto"))


def prumerge(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget | None = None, *, attention: Tensor, **options: Any
) -> Selection:
    """LLaVA-PruMerge, Shang et al. 2024 (arXiv 2403.15388): keep attention outliers, merge the rest into the nearest.

    Without a ``budget`` the number of outliers decides (``Budget.adaptive``), differently for every image.
    """
    kept = select_tokens(attention, cu_seqlens, Budget.adaptive() if budget is None else budget, **options)
    return merge.nearest(kept, tokens, weight=attention, backend=options.get("backend", "auto"))


def random_tokens(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, seed: int = 0, backend: str = "auto", **options: Any
) -> Selection:
    """Baseline: a random subset, the same one for a seed on every device.

    What is drawn in sequence b depends on ``seed``, b and its length, and on no other sequence.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int; got {type(seed).__name__}")
    _counts("random", tokens, cu_seqlens, budget, backend)  # refuses budgets by this name
    total = tokens.shape[0]
    place = torch.arange(total, device=tokens.device) - segments.spread(cu_seqlens[:-1], cu_seqlens, total)
    sequence = segments.sequence_ids(cu_seqlens, total)
    # A counter for each (sequence, place), hashed with the seed: nothing is drawn in turn.
    bits = _mixed(_mixed(sequence + _signed(seed * _GOLDEN)) + place)
    scores = (bits >> 40).float() + 2**23  # 24 bits: exact in float32
    return select_tokens(scores, cu_seqlens, budget, backend=backend, **options)


_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def _mixed(bits: Tensor) -> Tensor:
    """int64 scrambled by the finalizer of splitmix64 (Steele et al., OOPSLA 2014), in wrapping arithmetic."""
    bits = bits + _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return bits


def _columns(columns: int | Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) widths of the images' grids."""
    if isinstance(columns, Tensor):
        if columns.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"columns must be an int or an integer tensor; got {columns.dtype}")
        checks.check_vector("columns", columns, cu_seqlens.shape[0] - 1, columns.dtype)
        checks.check_device("columns", columns, "cu_seqlens", cu_seqlens)
        if readable(columns) and columns.numel() and int(columns.min()) < 1:
            raise ValueError(f"columns must be at least 1; got {int(columns.min())}")
        return columns.long()
    if not isinstance(columns, int) or isinstance(columns, bool):
        raise TypeError(f"columns must be an int or an integer tensor; got {type(columns).__name__}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    return torch.full((cu_seqlens.shape[0] - 1,), columns, dtype=torch.int64, device=cu_seqlens.device)


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
    width = _columns(columns, cu_seqlens)
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
    counts = _counts("uniform", tokens, cu_seqlens, budget, options.get("backend", "auto"))
    if (protected := options.get("protected")) is not None:
        checks.check_per_token("protected", protected, tokens, torch.bool)
    if columns is None:
        scores = merge.even_spacing(cu_seqlens, total, counts).float()
    else:
        row, column = _grid_places(cu_seqlens, total, columns, protected)
        scores = (row * 0.7548776662466927 + column * 0.5698402909980532) % 1
    return select_tokens(scores, cu_seqlens, budget, **options)


def average_pool(
    tokens: Tensor, cu_seqlens: Tensor, budget: Budget, *, columns: int | Tensor | None = None, **options: Any
) -> Selection:
    """Baseline: evenly spread tokens become the average of their neighbourhood; all tokens count.

    Without ``columns`` the token at the end of each run of neighbours stands for the run (1-D pooling); with it each
    patch joins the nearest kept one of the grid (2-D pooling for any budget), none a protected token.
    """
    _counts("pool", tokens, cu_seqlens, budget, options.get("backend", "auto"))  # refuses budgets by this name
    kept = uniform_grid(tokens, cu_seqlens, budget, columns=columns, **options)
    finite = tokens.detach().flatten(1).isfinite().all(1) | (kept.assignment >= 0)
    if columns is not None:
        # Places on a sphere of large radius: the highest cosine is the smallest distance.
        row, column = _grid_places(cu_seqlens, tokens.shape[0], columns, options.get("protected"))
        place = torch.stack([row, column, torch.full_like(row, 64.0)], 1).float()
        if (protected := options.get("protected")) is not None:
            finite = finite & ~protected  # no patch is near a CLS token
        place = torch.where(finite[:, None], place, torch.nan)
        return merge.nearest(kept, place, backend=options.get("backend", "auto"))
    before = torch.nn.functional.pad((kept.assignment >= 0).cumsum(0), (1, 0))[:-1].to(torch.int32)
    last = segments.spread(kept.cu_seqlens[1:], cu_seqlens, tokens.shape[0])
    first = segments.spread(kept.cu_seqlens[:-1], cu_seqlens, tokens.shape[0])
    place = torch.where(last > first, torch.minimum(before, last - 1), -1).to(torch.int32)
    return kept.merged(torch.where(finite, place, -1), torch.ones_like(kept.scores))


def norm(tokens: Tensor, cu_seqlens: Tensor, budget: Budget, **options: Any) -> Selection:
    """Baseline: the longest token vectors."""
    checks.check_rows("tokens", tokens)
    # Squares of float32 overflow from 1e19 on.
    length = torch.linalg.vector_norm(tokens.detach().flatten(1), dim=1, dtype=torch.float64)
    return select_tokens(length, cu_seqlens, budget, **options)


_BUILT_IN: dict[str, tuple[Callable[..., Selection], tuple[str, ...]]] = {
    "attention": (attention_topk, ("attention",)),
    "evit": (evit, ("attention",)),
    "tome": (tome, ("sizes",)),
    "divprune": (divprune, ()),
    "cdpruner": (cdpruner, ()),
    "visionzip": (visionzip, ("attention",)),
    "prumerge": (prumerge, ("attention",)),
    "random": (random_tokens, ()),
    "uniform": (uniform_grid, ("columns",)),
    "pool": (average_pool, ("columns",)),
    "norm": (norm, ()),
}
for _name, (_function, _needs) in _BUILT_IN.items():
    register_strategy(_name, _function, needs=_needs)
