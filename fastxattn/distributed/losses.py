"""InfoNCE and sigmoid losses over many processes: local rows against everybody's columns, gathered or in a ring."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastxattn.distributed import ring
from fastxattn.distributed.collectives import (
    GatherRows,
    GlobalSum,
    Group,
    gather_rows,
    row_counts,
    total_count,
    world_size,
)
from fastxattn.ops import contrastive
from fastxattn.ops.contrastive import checks
from fastxattn.ops.contrastive.reference import unit_rows, wide

STRATEGIES = ("gather", "ring")


def infonce_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    symmetric: bool = True,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The global InfoNCE loss: row ``i`` of this rank's ``a`` belongs to row ``i`` of this rank's ``b``.

    Args:
        a: (n, D), this rank's rows; ``n`` may differ between ranks and be 0.
        b: (n, D), this rank's rows.
        logit_scale: a number or one-element tensor, the same on every rank.
        groups: this rank's integer group ids of both sides, which may span ranks.
        symmetric: both directions, or only a to b.
        normalize: unit-length features.
        label_smoothing: share of the target spread over all candidates.
        strategy: ``gather`` holds everybody's features; ``ring`` passes them round in memory O(N D / W).
        group: process group; None for the default one.
        backend: see :func:`fastxattn.infonce_loss`.

    Returns:
        The global mean, the same on every rank; DDP's mean of the gradients is its gradient. Without
        torch.distributed, or on one rank, this is :func:`fastxattn.infonce_loss`.

    Raises:
        ValueError: a and b differ in rows, or an option does not go with the strategy.
        RuntimeError: another rank left or died; raised within the process group's timeout.
    """
    _check(a, b, strategy)
    if world_size(group) == 1:
        return contrastive.infonce_loss(
            a, b, logit_scale, groups=groups, symmetric=symmetric, normalize=normalize,
            label_smoothing=label_smoothing, backend=backend,
        )  # fmt: skip
    a, b = _prepared(a, b, normalize)
    scale = checks.one_element("logit_scale", logit_scale, a.device)
    counts = row_counts(a.shape[0], a.device, group)
    number = sum(counts)
    pairs = [(a, b, groups)] + ([(b, a, None if groups is None else groups[::-1])] if symmetric else [])
    shares = []
    for own, other, ids in pairs:
        if strategy == "ring":
            rows, has = ring.infonce_rows(own, other, scale, ids, label_smoothing, counts, group, backend)
            shares.append(rows.sum() / total_count(has, group).clamp(min=1))
            continue
        everybody = GatherRows.apply(other, counts, group)
        if ids is None:
            first = sum(counts[: dist.get_rank(group)])
            targets = torch.arange(first, first + own.shape[0], device=own.device)
            positives: dict[str, Any] = {"targets": targets}
            having = number
        else:
            columns = gather_rows(ids[1], counts, group)
            positives = {"groups": (ids[0], columns)}
            everyone = gather_rows(ids[0], counts, group)
            having = int((torch.isin(everyone, columns) & (everyone >= 0)).sum())
        total = contrastive.infonce_loss(
            own, everybody, scale, symmetric=False, reduction="sum", label_smoothing=label_smoothing,
            backend=backend, **positives,
        )  # fmt: skip
        shares.append(total / max(having, 1))
    result: torch.Tensor = GlobalSum.apply(sum(shares) / len(shares), group)
    return result


def sigmoid_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor = 0.0,
    *,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalize: bool = False,
    strategy: str = "gather",
    group: Group = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The global sigmoid loss; arguments, returns and errors as in :func:`infonce_loss` of this module."""
    _check(a, b, strategy)
    if world_size(group) == 1:
        return contrastive.sigmoid_loss(
            a, b, logit_scale, logit_bias, groups=groups, normalize=normalize, backend=backend
        )
    a, b = _prepared(a, b, normalize)
    scale = checks.one_element("logit_scale", logit_scale, a.device)
    bias = checks.one_element("logit_bias", logit_bias, a.device)
    counts = row_counts(a.shape[0], a.device, group)
    if strategy == "ring":
        total = ring.sigmoid_total(a, b, scale, bias, groups, counts, group, backend)
    else:
        first = sum(counts[: dist.get_rank(group)])
        targets = torch.arange(first, first + a.shape[0], device=a.device)
        positives: dict[str, Any] = {"targets": targets}
        if groups is not None:
            positives = {"groups": (groups[0], gather_rows(groups[1], counts, group))}
        everybody = GatherRows.apply(b, counts, group)
        total = contrastive.sigmoid_loss(
            a,
            everybody,
            scale,
            bias,
            reduction="sum",
            backend=backend,
            **positives,
        )
    result: torch.Tensor = GlobalSum.apply(total / max(sum(counts), 1), group)
    return result


def _check(a: torch.Tensor, b: torch.Tensor, strategy: str) -> None:
    checks.choice("strategy", strategy, STRATEGIES)
    checks.features("b", b, checks.features("a", a))
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have as many rows as a on each rank ({a.shape[0]}); got {b.shape[0]}")


def _prepared(a: torch.Tensor, b: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as they are sent: normalised before sending, so that the gradient is projected where it belongs."""
    if normalize:
        return unit_rows(wide(a)), unit_rows(wide(b))
    return a, b
