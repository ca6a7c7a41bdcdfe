"""Small segmented helpers in plain PyTorch: no host synchronisation, any device."""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 40
"""Of a :func:`fixed_point` number; 23 are left for sums."""


def sequence_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) int64: the sequence of each row; ``batch`` for rows beyond the last."""
    at = torch.arange(rows, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def inside(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) bool: whether each row belongs to a sequence."""
    return torch.arange(rows, device=cu_seqlens.device) < cu_seqlens[-1]


def scattered(index: Tensor, values: Tensor, rows: int, fill: float) -> Tensor:
    """(rows,) of ``fill``, with ``values`` (n,) at the rows ``index`` (n,) names; an index of -1 writes nothing."""
    out = torch.full((rows + 1,), fill, dtype=values.dtype, device=values.device)
    out[torch.where(index >= 0, index, rows).long()] = values
    return out[:rows]


def offsets_of(lengths: Tensor) -> Tensor:
    """(batch + 1,) int32 running sum of (batch,) lengths, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def segment_count(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) int64 sums of (total,) bool or int64 values: exact, so that one running sum serves all sequences.

    Floating-point values have to become :func:`fixed_point` numbers first. The difference of two floating-point running
    sums depends on what precedes the sequence in the batch, and an infinity there makes it NaN.
    """
    return torch.nn.functional.pad(values.to(torch.int64).cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def fixed_point(values: Tensor) -> Tensor:
    """(total,) int64: values in [-1, 1] in units of ``2**-FRACTION_BITS``. Sums are exact up to 2**23 tokens."""
    return (values.double() * 2**FRACTION_BITS).round().to(torch.int64)


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) maxima of (total,) values; -inf for an empty sequence. NaN must have been removed."""
    batch = cu_seqlens.shape[0] - 1
    out = values.new_full((batch + 1,), -torch.inf)
    return out.scatter_reduce(0, sequence_ids(cu_seqlens, values.shape[0]), values, "amax")[:batch]


def spread(values: Tensor, cu_seqlens: Tensor, rows: int, fill: float = 0) -> Tensor:
    """(rows,) value of each row's sequence, from (batch,) values; ``fill`` for rows beyond the last sequence."""
    return torch.nn.functional.pad(values, (0, 1), value=fill)[sequence_ids(cu_seqlens, rows)]


def relative_to_largest(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(total,) float64 in [0, 1]: each value as a share of the largest of its sequence; NaN and negative ones are 0.

    Where the largest is infinite, infinite values are 1 and finite ones 0. All 0 where nothing is positive.
    """
    positive = torch.where(values > 0, values, 0.0).double()
    largest = spread(segment_max(positive, cu_seqlens), cu_seqlens, values.shape[0])
    share = positive / torch.where(largest > 0, largest, 1.0)
    return torch.where(largest.isinf(), positive.isinf().double(), share)


def best_first(scores: Tensor, cu_seqlens: Tensor, protected: Tensor | None = None) -> Tensor:
    """(total,) rows in the order of their sequence, best first within it (the order of ``reference.order``)."""
    nan = scores.isnan()
    ranked = torch.sort(torch.where(nan, -torch.inf, scores) + 0.0, descending=True, stable=True).indices
    keys = [nan]
    if protected is not None:
        keys.append(~protected)
    for key in keys:
        ranked = ranked[torch.sort(key[ranked].to(torch.uint8), stable=True).indices]
    return ranked[torch.sort(sequence_ids(cu_seqlens, scores.shape[0])[ranked], stable=True).indices]


def share(total: int, weights: Tensor, limits: Tensor) -> Tensor:
    """Split ``total`` among (batch,) sequences in proportion to ``weights``, none above its limit; (batch,) int32.

    What a full sequence cannot take goes to the others in proportion; the last units go to the largest remainders,
    ties to the lowest index. Infinite weights take everything they can. Weights of 0 or NaN get a share, an equal one,
    when all others are full.
    """
    limits = limits.to(torch.float64)
    rest = torch.minimum(limits.sum(), limits.new_full((), total))
    given = torch.zeros_like(limits)
    weights = weights.to(torch.float64)
    ordinary = torch.where(weights.isfinite() & (weights > 0), weights, 0.0)
    for group in (weights.isposinf().double(), ordinary, torch.ones_like(limits)):
        given = given + _fill(rest - given.sum(), group, limits - given)
    whole = (given + 1e-9).floor()
    missing = rest - whole.sum()
    remainder = torch.where(whole < limits, given - whole, -torch.inf)
    place = torch.empty_like(remainder, dtype=torch.int64)
    ranked = torch.sort(remainder, descending=True, stable=True).indices
    place[ranked] = torch.arange(place.shape[0], device=place.device)
    return (whole + ((place < missing) & (whole < limits))).to(torch.int32)


def _fill(amount: Tensor, weights: Tensor, limits: Tensor) -> Tensor:
    """(batch,) shares of ``amount``: ``min(level * weights, limits)`` at the level at which they add up to it."""
    if weights.shape[0] == 0:
        return limits
    weights = weights / weights.amax().clamp_min(1e-300)
    level = torch.where(weights > 0, limits / weights.clamp_min(1e-300), torch.inf)  # at which a sequence is full
    order = torch.sort(level).indices
    filled = torch.nn.functional.pad(torch.where(weights > 0, limits, 0.0)[order].cumsum(0), (1, 0))[:-1]
    open_weight = weights[order].flip(0).cumsum(0).flip(0)
    # The level if the sequences before this one are full; right at the first that it does not fill.
    candidate = (amount - filled) / open_weight.clamp_min(1e-300)
    stops = (candidate <= level[order]) & (open_weight > 0)
    at = stops.to(torch.uint8).argmax()
    return torch.where(
        stops.any(), torch.minimum(candidate[at].clamp_min(0.0) * weights, limits), (weights > 0) * limits
    )


def inverse_norms(x: Tensor) -> Tensor:
    """(total,) float32: 1 / length of each row, 0 for a zero row, NaN for one that is not finite.

    For kernels that multiply rows before they normalise: a row longer than 1e18, whose products overflow float32,
    counts as not finite, one shorter than 1e-18 as zero.
    """
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)  # squares overflow float32 from 1e19 on
    return torch.where(norm <= 1e18, torch.where(norm >= 1e-18, 1 / norm, 0.0), torch.nan).float()


def unit_rows(x: Tensor) -> Tensor:
    """(total, channels) float32 rows of length 1; zero rows stay zero, rows that are not finite become NaN."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    inverse = torch.where(norm.isfinite(), torch.where(norm > 0, 1 / norm, 0.0), torch.nan)
    return x.float() * inverse.clamp_max(3e38).float()[:, None]


def members_by_row(assignment: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Who goes to each row: (total,) int64 sources, ascending for each row, and (rows + 1,) int64 where each begins."""
    ordered = torch.sort(assignment, stable=True)
    first = torch.searchsorted(ordered.values, torch.arange(rows + 1, dtype=torch.int32, device=assignment.device))
    return ordered.indices, first
