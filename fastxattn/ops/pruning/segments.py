"""Small segmented helpers in plain PyTorch: no host synchronisation, any device."""

from __future__ import annotations

import torch
from torch import Tensor


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


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) sums of (total,) values, in float64 or int64: by differences of one running sum."""
    exact = values.to(torch.float64 if values.dtype.is_floating_point else torch.int64)
    return torch.nn.functional.pad(exact.cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch,) maxima of (total,) values; -inf for an empty sequence. NaN must have been removed."""
    batch = cu_seqlens.shape[0] - 1
    out = values.new_full((batch + 1,), -torch.inf)
    return out.scatter_reduce(0, sequence_ids(cu_seqlens, values.shape[0]), values, "amax")[:batch]


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
    ties to the lowest index. Weights of 0 or NaN get a share, an equal one, when all
    others are full.
    """
    limits = limits.to(torch.float64)
    weights = weights.to(torch.float64).nan_to_num(nan=0.0).clamp_min(0.0)
    wanted = limits.sum().clamp_max(total)
    given = torch.zeros_like(limits)
    for _ in range(16):  # each round fills at least one sequence or places everything; rounding takes the rest
        open_weights = torch.where(given < limits, weights, 0.0)
        open_weights = torch.where(open_weights.sum() > 0, open_weights, (given < limits).to(weights.dtype))
        rest = (wanted - given.sum()).clamp_min(0.0)
        scale = open_weights.sum()
        step = torch.where(scale > 0, rest * open_weights / scale.clamp_min(1e-300), 0.0)
        given = torch.minimum(given + step, limits)
    whole = (given + 1e-9).floor()
    missing = wanted - whole.sum()
    remainder = torch.where(whole < limits, given - whole, -torch.inf)
    place = torch.empty_like(remainder, dtype=torch.int64)
    ranked = torch.sort(remainder, descending=True, stable=True).indices
    place[ranked] = torch.arange(place.shape[0], device=place.device)
    return (whole + ((place < missing) & (whole < limits))).to(torch.int32)


def inverse_norms(x: Tensor) -> Tensor:
    """(total,) float32: 1 / length of each row, 0 for a zero row, NaN for one that is not finite."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return torch.where(norm.isfinite(), torch.where(norm > 0, 1 / norm, 0.0), torch.nan)


def members_by_row(assignment: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Who goes to each row: (total,) int64 sources, ascending for each row, and (rows + 1,) int64 where each begins."""
    ordered = torch.sort(assignment, stable=True)
    first = torch.searchsorted(ordered.values, torch.arange(rows + 1, dtype=torch.int32, device=assignment.device))
    return ordered.indices, first
