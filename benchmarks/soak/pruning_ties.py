"""Whether a selection that differs from the reference's does so by a near-tie: similarities closer than rounding.

Every choice is judged again in float64: what was chosen must be as good as the best, within :data:`CLOSE`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.pruning import Selection, reference
from fastxattn.ops.pruning.strategies import _grid_places, _relative
from fastxattn.testing import offsets

CLOSE = 4e-6
"""Rounding of a cosine in float32, at the widths drawn here."""


def near_tie(problem: Any, found: Selection, expected: Selection) -> bool:
    """Whether ``found`` is as good as ``expected``, the reference's result."""
    if problem.strategy not in JUDGES or not torch.equal(found.cu_seqlens, expected.cu_seqlens):
        return False
    start, judge = 0, JUDGES[problem.strategy]
    return all(judge(problem, found, expected, slice(start, start := start + n)) for n in problem.lengths if n)


def _cosine(features: Tensor) -> Tensor:
    unit = reference.unit_rows(features)
    return unit @ unit.T


def _greedy(problem: Any, found: Selection, expected: Selection, rows: slice) -> bool:
    """Every pick of a greedy search: its gain is the largest, given the picks before it."""
    unit = reference.unit_rows(problem.tokens[rows])
    weight = torch.ones(len(unit), dtype=torch.float64)
    if "relevance" in problem.vectors:
        weight = _relative(problem.vectors["relevance"], offsets(problem.lengths))[rows].double()
    invalid = ~(unit.isfinite().all(1) & weight.isfinite())
    unit, weight = torch.where(invalid[:, None], 0.0, unit), torch.where(invalid, 0.0, weight)
    cosine, left = unit @ unit.T, torch.ones(len(unit), dtype=torch.bool)
    diverse = problem.strategy == "divprune"
    kernel = cosine * weight[:, None] * weight
    gain = kernel.diagonal().clone()
    if diverse:
        others = cosine.clone().fill_diagonal_(-torch.inf)
        others[:, invalid] = -torch.inf
        gain = -others.amax(1)
    gain[invalid] = -torch.inf
    close = CLOSE if diverse else CLOSE * max(float(gain.max()), 0.0)
    scores = found.scores[rows]
    guarded = problem.vectors.get("protected", torch.zeros(len(problem.tokens), dtype=torch.bool))[rows]
    factors: list[Tensor] = []
    for step, row in enumerate(
        scores.argsort(descending=True, stable=True)[: int((scores > -torch.inf).sum())].tolist()
    ):
        if not guarded[row] and gain[row] < gain[left].max() - close:
            return False
        left[row] = False
        if diverse:
            gain = torch.where(invalid, -torch.inf, torch.inf) if step == 0 else gain
            gain = gain if invalid[row] else torch.minimum(gain, -cosine[row])
        elif gain[row] > reference.FLOOR * kernel.diagonal().max():
            factor = kernel[row] - sum((f * f[row] for f in factors), torch.zeros(()))
            factors.append(factor / gain[row].sqrt())
            gain = torch.where(invalid, -torch.inf, (gain - factors[-1] ** 2).clamp_min(0.0))
    return True


def _matched(cosine: Tensor, source: Tensor, target: Tensor, candidates: Tensor) -> bool:
    """Every pair of a source and its target: no candidate is more similar."""
    if not source.numel():
        return True
    known = torch.where(cosine.isnan(), -torch.inf, cosine)[source]
    best = known[:, candidates].amax(1)
    return bool((known.gather(1, target[:, None]).squeeze(1) >= best - CLOSE).all())


def _pairs(selection: Selection, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a sequence that merged into another, those others, and (tokens,) which are kept."""
    place = selection.assignment[rows].long()
    at = selection.keep_index.long()[place.clamp_min(0)] - rows.start
    merged = (place >= 0) & (at != torch.arange(len(place)))
    kept = (place >= 0) & ~merged
    return merged.nonzero().squeeze(1), at[merged], kept


def _nearest(problem: Any, found: Selection, expected: Selection, rows: slice) -> bool:
    """The same tokens are kept, and every other one joined the most similar."""
    features = problem.tokens[rows]
    source, target, kept = _pairs(found, rows)
    theirs, their_target, their_kept = _pairs(expected, rows)
    if not (torch.equal(source, theirs) and torch.equal(kept, their_kept)):
        return False
    candidates = kept
    if problem.strategy == "pool":
        total, columns = len(problem.tokens), problem.options.get("columns")
        if columns is None:
            return torch.equal(target, their_target)
        width = columns if isinstance(columns, Tensor) else torch.full((len(problem.lengths),), columns)
        place = _grid_places(offsets(problem.lengths), total, width, problem.vectors.get("protected"))
        features = torch.stack([*place, torch.full_like(place[0], 64.0)], 1)[rows].float()
        candidates = kept & ~problem.vectors.get("protected", torch.zeros(total, dtype=torch.bool))[rows]
    elif problem.strategy == "visionzip":
        candidates = torch.zeros_like(kept)
        candidates[torch.cat([target, their_target])] = True
    return _matched(_cosine(features), source, target, candidates)


def _bipartite(problem: Any, found: Selection, expected: Selection, rows: slice) -> bool:
    """The same number merged, each with the most similar, and none that is less similar than one that stayed."""
    free = torch.ones(rows.stop - rows.start, dtype=torch.bool)
    if "protected" in problem.vectors:
        free = ~problem.vectors["protected"][rows]
    place = free.cumsum(0) - 1
    even, odd = free & (place % 2 == 0), free & (place % 2 == 1)
    cosine = torch.where((c := _cosine(problem.tokens[rows])).isnan(), -torch.inf, c)
    source, target, kept = _pairs(found, rows)
    if not odd.any() or not source.numel():
        return torch.equal(found.assignment[rows], expected.assignment[rows])
    best = cosine[:, odd].amax(1)
    stayed = even & kept
    worst = best[source].min()
    fair = not stayed.any() or bool(worst >= best[stayed].max() - CLOSE)
    return fair and bool(even[source].all() and odd[target].all()) and _matched(cosine, source, target, odd)


JUDGES = {
    "divprune": _greedy,
    "cdpruner": _greedy,
    "tome": _bipartite,
    "prumerge": _nearest,
    "visionzip": _nearest,
    "pool": _nearest,
}
