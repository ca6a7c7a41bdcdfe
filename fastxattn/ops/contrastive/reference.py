"""The readable oracle of the contrastive losses: dense eager torch, float64-capable, differentiated by torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxattn.ops.contrastive.problem import Metrics, Problem


@dataclass
class Direction:
    """One direction of the loss: a row per query, its candidates along the columns."""

    logits: Tensor  # (N, M)
    positive: Tensor  # (N, M) bool
    visible: Tensor  # (N, M) bool, positives included
    extra: Tensor  # (N, E) logits of further negatives


def unit_rows(x: Tensor) -> Tensor:
    """``x / |x|`` along the last dimension; a zero vector stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = length <= 1e-12
    safe = torch.linalg.vector_norm(torch.where(zero, torch.ones_like(x), x), dim=-1, keepdim=True)
    return torch.where(zero, torch.zeros_like(x), x / safe)


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that losses are computed in: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def masks(p: Problem) -> tuple[Tensor, Tensor]:
    """Which pairs are positives and which take part, from targets, groups, ids and self-exclusion."""
    (n, m), device = (p.a.shape[0], p.b.shape[0]), p.a.device
    rows, columns = torch.arange(n, device=device), torch.arange(m, device=device)
    if p.group_a is not None and p.group_b is not None:
        positive = (p.group_a[:, None] == p.group_b[None, :]) & (p.group_a >= 0)[:, None]
    else:
        targets = rows.where(rows < m, -1) if p.targets is None else p.targets
        positive = targets[:, None] == columns[None, :]
    dead = torch.zeros_like(positive)
    if p.exclude_self:
        dead = rows[:, None] == columns[None, :]
    positive = positive & ~dead
    if p.ignore_a is not None and p.ignore_b is not None:
        same = (p.ignore_a[:, None] == p.ignore_b[None, :]) & (p.ignore_a >= 0)[:, None]
        dead = dead | (same & ~positive)
    return positive, ~dead


def similarities(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides as the logits see them, and their products, accumulated in the loss's dtype."""
    a, b = wide(p.a), wide(p.b)
    if p.normalize:
        a, b = unit_rows(a), unit_rows(b)
    return a, b, a @ b.T


def direction_loss(d: Direction, p: Problem) -> tuple[Tensor, Tensor]:
    """Each row's loss, and whether the row has a positive."""
    count = d.positive.sum(1)
    has = count > 0
    negative = d.visible & ~d.positive
    low = float("-inf")
    mean_pos = torch.where(d.positive, d.logits, 0.0).sum(1) / count.clamp(min=1)
    everything = torch.cat([d.logits.masked_fill(~d.visible, low), d.extra], 1)
    if p.decoupled:
        negatives = torch.cat([d.logits.masked_fill(~negative, low), d.extra], 1)
        some = (negatives > low).any(1) | negatives.isnan().any(1)
        lse = torch.logsumexp(torch.where(some[:, None], negatives, 0.0), 1)
        return torch.where(has & some, lse - mean_pos, 0.0), has
    lse = torch.logsumexp(torch.where(has[:, None], everything, 0.0), 1)
    loss = lse - mean_pos
    if p.label_smoothing > 0:
        number = d.visible.sum(1) + d.extra.shape[1]
        mean_all = (torch.where(d.visible, d.logits, 0.0).sum(1) + d.extra.sum(1)) / number.clamp(min=1)
        loss = (1 - p.label_smoothing) * loss + p.label_smoothing * (lse - mean_all)
    return torch.where(has, loss, 0.0), has


def measure(d: Direction) -> Metrics:
    """Retrieval figures of one direction: the rank of each row's best positive and the mean of all its positives."""
    count = d.positive.sum(1)
    mean_pos = torch.where(d.positive, d.logits, 0.0).sum(1) / count.clamp(min=1)
    best = best_positive(d.positive, d.logits)
    negative = d.visible & ~d.positive
    rank = 1 + (negative & ((d.logits >= best[:, None]) | best.isnan()[:, None])).sum(1)
    means = torch.where(negative, d.logits, 0.0).sum(1) / negative.sum(1).clamp(min=1)
    return Metrics.of(rank, mean_pos, means, count > 0)


def best_positive(positive: Tensor, logits: Tensor) -> Tensor:
    """Each row's highest logit of a positive; infinity, which no negative passes, where it has none."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), torch.inf)
    best = torch.where(positive, logits.detach(), -torch.inf).amax(1)
    return torch.where(positive.any(1), best, torch.inf)


def infonce_reference(p: Problem) -> tuple[list[tuple[Tensor, Tensor]], list[Metrics]]:
    """Per direction (rows, then columns when symmetric): losses and which rows have a positive; and metrics."""
    a, b, products = similarities(p)
    scale = p.scale
    logits = scale * products
    n, m = logits.shape
    positive, visible = masks(p)
    if p.teacher_a is not None and p.teacher_b is not None:
        return _distilled(p, logits, p.teacher_a @ p.teacher_b.T), []
    limits: list[Tensor | None] = [None, None]
    if p.margin is not None:
        gap = (scale * p.margin).detach()
        limits = [best_positive(positive, logits) + gap, best_positive(positive.T, logits.T) + gap]
    none = logits.new_zeros((n, 0))
    extra_rows = [none]
    if p.hard_negatives is not None:
        hard = wide(p.hard_negatives)
        extra_rows.append(scale * torch.einsum("nd,nkd->nk", a, unit_rows(hard) if p.normalize else hard))
    if p.queue_b is not None:
        queue = wide(p.queue_b)
        extra_rows.append(scale * a @ (unit_rows(queue) if p.normalize else queue).T)
    directions = [Direction(logits, positive, visible, torch.cat(extra_rows, 1))]
    if p.symmetric:
        extra = logits.new_zeros((m, 0))
        if p.queue_a is not None:
            queue = wide(p.queue_a)
            extra = scale * b @ (unit_rows(queue) if p.normalize else queue).T
        directions.append(Direction(logits.T, positive.T, visible.T, extra))
    for d, limit in zip(directions, limits, strict=False):
        if limit is not None:
            d.visible = d.visible & (d.positive | ~(d.logits > limit[:, None]))
    losses = [direction_loss(d, p) for d in directions]
    return losses, [measure(d) for d in directions] if p.metrics else []


def _distilled(p: Problem, logits: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    pairs = [(logits, target), (logits.T, target.T)] if p.symmetric else [(logits, target)]
    return [
        (-(t.softmax(1) * z.log_softmax(1)).sum(1), torch.ones(z.shape[0], dtype=torch.bool, device=z.device))
        for z, t in pairs
    ]


def sigmoid_reference(p: Problem) -> Tensor:
    """Each row's sum of -log sigmoid(+-logit)."""
    assert p.bias is not None
    _, _, products = similarities(p)
    logits = p.scale * products + p.bias
    positive, visible = masks(p)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    return torch.where(visible, losses, 0.0).sum(1)
