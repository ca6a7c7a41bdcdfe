"""The losses put together from fused statistics: everything here is O(N), the N x M work is in the operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxattn.ops.contrastive.operator import apply, operator
from fastxattn.ops.contrastive.problem import Metrics, Pairs, Problem, Sigmoid, Statistics
from fastxattn.ops.contrastive.reference import unit_rows, wide
from fastxattn.runtime.operators import derivative_wanted

Extra = tuple[Tensor, Tensor, Tensor | int]
"""Further negatives of each row: their log-sum-exp, the sum of their logits, their number."""
Rows = tuple[Tensor, Tensor]
"""Each row's loss, and whether it has a positive."""


def inverse_norms(x: Tensor) -> Tensor:
    """``1 / |x|`` per row in float32; 0 for a zero vector, which therefore stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float32)
    return torch.where(length > 1e-12, 1 / length, 0.0)


def dense_ids(id_a: Tensor, id_b: Tensor) -> tuple[Tensor, Tensor]:
    """The same equalities in int32; negative ids become ids that equal nothing."""
    n = id_a.shape[0]
    found, order = torch.cat((id_a, id_b)).sort()
    number = F.pad((found[1:] != found[:-1]).int(), (1, 0)).cumsum(0, dtype=torch.int32)[: order.shape[0]]
    dense = torch.empty_like(number).scatter(0, order, number)  # torch.unique has no shape for a compiler
    return dense[:n].where(id_a >= 0, -1).contiguous(), dense[n:].where(id_b >= 0, -3).contiguous()


def pairs_of(p: Problem, backend: str) -> Pairs:
    """The matrix of a loss, and the exact logits of single positives."""
    n, m, device = p.a.shape[0], p.b.shape[0], p.a.device
    norms = (inverse_norms(p.a), inverse_norms(p.b)) if p.normalize else (None, None)
    skips: tuple[Tensor | None, Tensor | None] = (None, None)
    if p.ignore_a is not None and p.ignore_b is not None and n > 0 and m > 0:
        skips = dense_ids(p.ignore_a, p.ignore_b)
    if p.group_a is not None and p.group_b is not None:
        id_a, id_b = dense_ids(p.group_a, p.group_b)
    else:
        rows = torch.arange(n, dtype=torch.int32, device=device)
        id_a = rows.where(rows < m, -1) if p.targets is None else p.targets.int()
        if p.exclude_self:  # an excluded pair is no positive: no limit, no rank and no mean comes from it
            id_a = id_a.where(id_a != rows, -1)
        id_b = torch.arange(m, dtype=torch.int32, device=device)
    pairs = Pairs(
        a=p.a,
        b=p.b,
        scale=p.scale,
        bias=p.bias,
        norm_a=norms[0],
        norm_b=norms[1],
        id_a=id_a,
        id_b=id_b,
        skip_a=skips[0],
        skip_b=skips[1],
        exclude_self=p.exclude_self,
    )
    if p.group_a is not None or p.teacher_a is not None or n == 0 or m == 0:
        return pairs
    return pairs.replace(exact=positives(pairs, backend, blocked=False))


def positives(pairs: Pairs, backend: str, blocked: bool) -> Tensor:
    """The logit of each row's positive: summed precisely, or as the blocks of the product round it.

    Without a positive it is 0, or infinity as a block's, which no negative reaches.
    """
    if not (pairs.a.shape[0] and pairs.b.shape[0]):
        none = torch.inf if blocked else 0.0
        return torch.full(pairs.a.shape[:1], none, dtype=torch.float32, device=pairs.a.device)
    plain = {
        name: None if t is None else t.detach() for name, t in zip(pairs.bits, pairs.differentiated(), strict=True)
    }
    alone = pairs.replace(**plain, skip_a=None, skip_b=None, exact=None, exclude_self=False)
    result: Tensor = operator("positive_logits", backend)(*alone.values(), blocked)
    return result


def _by_column(pairs: Pairs, at: Tensor) -> Tensor:
    """Per column the value of its best positive; infinity where it has none."""
    assert pairs.id_a is not None
    m = pairs.b.shape[0]
    slot = torch.where(pairs.id_a >= 0, pairs.id_a, m).long()
    highest = at.new_full((m + 1,), -torch.inf).scatter_reduce(0, slot, at, "amax")[:m]
    return torch.where(highest == -torch.inf, torch.inf, highest)


def infonce_fused(p: Problem, backend: str) -> tuple[list[Rows], list[Metrics]]:
    """As :func:`fastxattn.ops.contrastive.reference.infonce_reference`, without the logits in memory."""
    pairs = pairs_of(p, backend)
    if p.teacher_a is not None and p.teacher_b is not None:
        return _distilled(p, pairs, backend, p.teacher_a, p.teacher_b), []
    limits: tuple[Tensor | None, Tensor | None] = (None, None)
    ranks: tuple[Tensor | None, Tensor | None] = (None, None)
    if p.metrics or p.margin is not None:
        at = positives(pairs, backend, blocked=True)
        best = at, _by_column(pairs, at)
        if p.metrics:
            ranks = best
        if p.margin is not None:
            gap = p.scale.detach() * p.margin
            limits = best[0] + gap, best[1] + gap
    means = p.metrics or p.label_smoothing > 0
    a, b = _summed(p)
    statistics = pairs.into(
        Statistics,
        limit_row=limits[0],
        limit_col=limits[1],
        rank_row=ranks[0],
        rank_col=ranks[1],
        columns=p.symmetric,
        means=means,
    )
    row, col = apply("pair_stats", backend, a, b, *statistics.values())
    extras = _queue(p, (a, p.a, pairs.norm_a), p.queue_b, means, backend) + _hard(p, a)
    losses = [row_losses(row, p, extras)]
    if p.symmetric:
        losses.append(row_losses(col, p, _queue(p, (b, p.b, pairs.norm_b), p.queue_a, means, backend)))
    metrics = []
    if p.metrics:
        for stats, first in list(zip((row.detach(), col.detach()), ranks, strict=True))[: 1 + p.symmetric]:
            assert first is not None
            ahead = torch.where(first.isnan(), stats[4], stats[6])  # every negative is ahead of a positive that is NaN
            metrics.append(Metrics.of(1 + ahead, stats[2], stats[1], stats[5] > 0))
    return losses, metrics


def row_losses(stats: Tensor, p: Problem, extras: list[Extra]) -> Rows:
    """Each row's loss and whether it has a positive, from (7, N) statistics and further negatives."""
    lse_neg, mean_neg, mean_pos, excess, num_neg, num_pos = stats[:6].unbind(0)
    for extra in extras:
        lse_neg = torch.logaddexp(lse_neg, extra[0])
    has = num_pos > 0
    if p.decoupled:
        some = has & (lse_neg != -torch.inf)
        return torch.where(some, torch.where(some, lse_neg, 0.0) - mean_pos, 0.0), has
    # softplus keeps the last digits of a converged row, where lse - positive would cancel.
    top = mean_pos + excess
    rest = F.softplus(lse_neg - top, threshold=50.0)
    loss = rest + excess
    if p.label_smoothing > 0:
        total = num_neg * mean_neg + num_pos * mean_pos
        number = num_neg + num_pos
        for _, added, count in extras:
            total, number = total + added, number + count
        away = top + rest - total / number.clamp(min=1)
        loss = (1 - p.label_smoothing) * loss + p.label_smoothing * away
    return torch.where(has, loss, 0.0), has


def _summed(p: Problem) -> tuple[Tensor, Tensor]:
    """The features, in float32 where gradients of several parts of the loss add up on them."""
    if p.a is p.b:
        return (p.a.float(),) * 2
    several = p.hard_negatives is not None or p.queue_b is not None
    return p.a.float() if several else p.a, p.b if p.queue_a is None else p.b.float()


def _hard(p: Problem, a: Tensor) -> list[Extra]:
    if p.hard_negatives is None or p.hard_negatives.shape[1] == 0:
        return []
    hard = wide(p.hard_negatives)
    if p.normalize:
        a, hard = unit_rows(a), unit_rows(hard)
    logits = p.scale * torch.einsum("nd,nkd->nk", a, hard)
    return [(torch.logsumexp(logits, 1), logits.sum(1), logits.shape[1])]


def _queue(
    p: Problem, side: tuple[Tensor, Tensor, Tensor | None], queue: Tensor | None, means: bool, backend: str
) -> list[Extra]:
    """Further negatives of a side: its features in the dtype of their gradient, as they are, and their norms."""
    if queue is None or queue.shape[0] == 0:
        return []
    gradient, x, norm = side
    statistics = Statistics(
        a=x,
        b=queue,
        scale=p.scale,
        norm_a=norm,
        norm_b=inverse_norms(queue) if p.normalize else None,
        id_a=torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device),
        id_b=torch.zeros(queue.shape[0], dtype=torch.int32, device=x.device),
        columns=False,
        means=means,
    )
    stats, _ = apply("pair_stats", backend, gradient, queue, *statistics.values())
    return [(stats[0], stats[1] * queue.shape[0], queue.shape[0])]


def _distilled(p: Problem, pairs: Pairs, backend: str, teacher_a: Tensor, teacher_b: Tensor) -> list[Rows]:
    nothing = torch.full((p.a.shape[0],), -1, dtype=torch.int32, device=p.a.device)
    # In float32: each feature's gradient is a difference of two parts, which must not be rounded before it is taken.
    a, b = p.a.float(), p.b.float()
    statistics = pairs.replace(a=a, b=b, id_a=nothing, exact=None).into(Statistics, columns=p.symmetric)
    stats = apply("pair_stats", backend, a, b, *statistics.values())
    if p.normalize:
        a, b = unit_rows(a), unit_rows(b)
    dots = [apply("soft_targets", a, b, p.scale, teacher_a, teacher_b)[0]]
    if p.symmetric:
        dots.append(apply("soft_targets", b, a, p.scale, teacher_b, teacher_a)[0])
    # Without candidates the log-sum-exp is -inf, and there is nothing to learn.
    lses = [torch.where(s[0] == -torch.inf, 0.0, s[0]) for s in stats]
    return [(lse - dot, torch.ones_like(dot, dtype=torch.bool)) for lse, dot in zip(lses, dots, strict=False)]


def sigmoid_fused(p: Problem, weight: Tensor | None, backend: str) -> Tensor:
    """Each row's loss, or with ``weight`` the weighted sum over rows in one pass with its gradients."""
    pairs = pairs_of(p, backend)
    if weight is None:
        rows: Tensor = apply("sigmoid_rows", backend, *pairs.values())
        return rows
    needs = sum(bit for bit, t in zip(pairs.bits.values(), pairs.differentiated(), strict=True) if derivative_wanted(t))
    total: Tensor = apply("sigmoid_sum", backend, needs, *pairs.into(Sigmoid, weight=weight).values())[0]
    return total
