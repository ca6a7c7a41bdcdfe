"""Reference implementations of the six operations: plain PyTorch, one sequence at a time, float64 where it decides.

The one order everything ranks by, best first: protected tokens before others; numbers before NaN; higher score before
lower (-0 equals 0); lower index before higher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.pruning.problem import MAX_MIN, Gather, Greedy, Match, Merge, Quantile, Select

FLOOR = 1e-6
"""A token whose residual volume is below this share of the largest quality adds nothing to a determinant."""


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(zip(ends, ends[1:], strict=False))


def order(scores: Tensor, protected: Tensor | None = None) -> Tensor:
    """Indices of one sequence's tokens, best first."""
    nan = scores.isnan()
    by_score = torch.sort(torch.where(nan, -torch.inf, scores) + 0.0, descending=True, stable=True).indices
    by_nan = torch.sort(nan[by_score].to(torch.uint8), stable=True).indices
    ranked = by_score[by_nan]
    if protected is not None:
        ranked = ranked[torch.sort((~protected[ranked]).to(torch.uint8), stable=True).indices]
    return ranked


def kept_offsets(cu_seqlens: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """(batch + 1,) int32 offsets of the kept rows: counts clipped to [0, length], their sum to ``capacity``."""
    kept = torch.minimum(counts.clamp_min(0), cu_seqlens.diff()).cumsum(0).clamp_max(capacity)
    return torch.nn.functional.pad(kept, (1, 0)).to(torch.int32)


def select(p: Select) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``counts[b]`` tokens of each sequence, ascending; where each token went; optionally their rows of x."""
    cu_keep = kept_offsets(p.cu_seqlens, p.counts, p.capacity)
    keep_index = torch.full((p.capacity,), -1, dtype=torch.int32, device=p.scores.device)
    assignment = torch.full((p.scores.shape[0],), -1, dtype=torch.int32, device=p.scores.device)
    for (begin, end), (out, out_end) in zip(_bounds(p.cu_seqlens), _bounds(cu_keep), strict=True):
        ranked = order(p.scores[begin:end], None if p.protected is None else p.protected[begin:end])
        kept = ranked[: out_end - out].sort().values + begin
        keep_index[out:out_end] = kept.to(torch.int32)
        assignment[kept] = torch.arange(out, out_end, dtype=torch.int32, device=p.scores.device)
    if p.x is None:
        return keep_index, cu_keep, assignment, p.scores.new_empty(0)
    return keep_index, cu_keep, assignment, gather(Gather(x=p.x, index=keep_index, coefficient=None))


def gather(p: Gather) -> Tensor:
    """``out[j] = coefficient[j] * x[index[j]]``, 0 where ``index[j]`` is -1."""
    if p.x.shape[0] == 0:
        return p.x.new_zeros(p.index.shape[0], p.x.shape[1])
    rows = p.x.index_select(0, p.index.clamp_min(0).long())
    if p.coefficient is not None:
        rows = (rows.to(_wide(p.x)) * p.coefficient.to(_wide(p.x))[:, None]).to(p.x.dtype)
    return torch.where(p.index[:, None] >= 0, rows, 0.0)


def merge(p: Merge) -> Tensor:
    """``out[a] = sum of coefficient[i] * x[i] over assignment[i] == a``; rows of -1 are never read into a sum."""
    members = torch.nonzero(p.assignment >= 0).squeeze(1)
    values = p.x.index_select(0, members).to(_wide(p.x))
    if p.coefficient is not None:
        values = values * p.coefficient.to(_wide(p.x)).index_select(0, members)[:, None]
    out = torch.zeros(p.rows, p.x.shape[1], dtype=_wide(p.x), device=p.x.device)
    return out.index_add(0, p.assignment.index_select(0, members).long(), values).to(p.x.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1 in float64; a zero row stays zero, a row with NaN or infinity becomes NaN."""
    wide = x.double()
    norm = wide.norm(dim=1, keepdim=True)
    unit = torch.where(norm > 0, wide / norm, wide * 0)
    return torch.where(wide.isfinite().all(1, keepdim=True), unit, torch.nan)


def match(p: Match) -> tuple[Tensor, Tensor]:
    """For each row of A the row of B (same sequence) of the highest cosine similarity, ties to the first in B.

    NaN ranks below every number. Without a B, ``best`` is -1 and the similarity NaN.
    """
    best = torch.full_like(p.a_index, -1)
    similarity = torch.full(p.a_index.shape, torch.nan, dtype=torch.float32, device=p.x.device)
    for (a, a_end), (b, b_end) in zip(_bounds(p.cu_a), _bounds(p.cu_b), strict=True):
        if a == a_end or b == b_end:
            continue
        rows_a, rows_b = p.a_index[a:a_end].long(), p.b_index[b:b_end]
        products = (unit_rows(p.x[rows_a]) @ unit_rows(p.x[rows_b.long()]).T).float()
        comparable = torch.where(products.isnan(), -torch.inf, products)
        # max() promises no order among equals; the result is the first of them.
        first = (comparable == comparable.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
        best[a:a_end] = rows_b[first]
        similarity[a:a_end] = products.gather(1, first[:, None]).squeeze(1)
    return best, similarity


def greedy(p: Greedy) -> Tensor:
    """(total,) float32: -t for the row picked at step t of its sequence's greedy search, -inf for the others.

    ``MAX_MIN`` picks the row farthest (1 - cosine) from its nearest picked row, starting with the row farthest from its
    nearest neighbour. ``DETERMINANT`` picks the row that enlarges ``det(diag(q) S diag(q))`` of the picked rows most.
    Protected rows are picked first, in order; rows that are not finite last.
    """
    out = torch.full((p.x.shape[0],), -torch.inf, dtype=torch.float32, device=p.x.device)
    search = _max_min if p.mode == MAX_MIN else _determinant
    for (begin, end), count in zip(_bounds(p.cu_seqlens), p.counts.tolist(), strict=True):
        n = end - begin
        unit = unit_rows(p.x[begin:end])
        weight = torch.ones(n, dtype=torch.float64, device=p.x.device)
        if p.quality is not None:
            weight = p.quality[begin:end].double()
        invalid = ~(unit.isfinite().all(1) & weight.isfinite())
        unit, weight = torch.where(invalid[:, None], 0.0, unit), torch.where(invalid, 0.0, weight)
        seeds = [] if p.protected is None else torch.nonzero(p.protected[begin:end]).flatten().tolist()
        for step, row in enumerate(search(unit, weight, invalid, seeds, min(max(count, 0), n, p.max_count))):
            out[begin + row] = -float(step)
    return out


def _first_best(value: Tensor) -> int:
    comparable = torch.where(value.isnan(), -torch.inf, value)
    candidates = ~value.isnan() & (comparable == comparable.max())
    return int(candidates.to(torch.uint8).argmax())


def _max_min(unit: Tensor, weight: Tensor, invalid: Tensor, seeds: list[int], count: int) -> list[int]:
    gram = (unit @ unit.T).float()
    others = gram.clone().fill_diagonal_(-torch.inf)
    others[:, invalid] = -torch.inf
    # value: minus the similarity to the nearest picked row; NaN once picked.
    value = -others.amax(1) if unit.shape[0] else others.new_zeros(0)
    value[invalid] = -torch.inf
    picked: list[int] = []
    while len(picked) < count:
        row = seeds[len(picked)] if len(picked) < len(seeds) else _first_best(value)
        if not picked:
            value = torch.where(invalid, -torch.inf, torch.inf)
        if not invalid[row]:
            value = torch.minimum(value, -gram[row])
        picked.append(row)
        value[row] = torch.nan
    return picked


def _determinant(unit: Tensor, weight: Tensor, invalid: Tensor, seeds: list[int], count: int) -> list[int]:
    # Incremental Cholesky of Chen et al. 2018: value is the squared residual of each row given the picked ones.
    # Rounded as in the kernels: equal rows have equal similarities, whatever the order of a product's sums.
    similarity = (unit @ unit.T).float().double()
    # A unit row's similarity to itself is 1, not nearly 1: equal qualities tie exactly.
    similarity.fill_diagonal_(0.0).diagonal().copy_((unit != 0).any(1))
    kernel = similarity * weight[:, None] * weight
    value = kernel.diagonal().clone()
    floor = FLOOR * (float(value.max()) if value.numel() else 0.0)
    value[value <= floor] = 0.0
    value[invalid] = -torch.inf
    factors: list[Tensor] = []
    picked: list[int] = []
    while len(picked) < count:
        row = seeds[len(picked)] if len(picked) < len(seeds) else _first_best(value)
        if value[row] > 0:
            factor = kernel[row].clone()
            for other in factors:
                factor -= other * other[row]
            factor /= value[row].sqrt()
            factors.append(factor)
            value = value - factor**2
            value[value.abs() <= floor] = 0.0
            value[(value < 0) & ~invalid] = 0.0
        picked.append(row)
        value[row] = torch.nan
    return picked


def quantile(p: Quantile) -> Tensor:
    """(batch, len(q)) float32: linearly interpolated quantiles of each sequence's scores, NaN scores left out."""
    out = p.scores.new_full((p.cu_seqlens.shape[0] - 1, p.q.shape[0]), torch.nan)
    for b, (begin, end) in enumerate(_bounds(p.cu_seqlens)):
        values = p.scores[begin:end]
        values = values[~values.isnan()].sort().values
        if values.numel():
            place = p.q.double() * (values.numel() - 1)
            low = place.floor().long().clamp(0, values.numel() - 1)
            high = (low + 1).clamp_max(values.numel() - 1)
            share = (place - low).float()
            between = values[low] + (values[high] - values[low]) * share
            out[b] = torch.where((share == 0) | (values[low] == values[high]), values[low], between)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
