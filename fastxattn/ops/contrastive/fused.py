"""The losses put together from fused statistics: everything here is O(N), the N x M work is in the operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastxattn.ops.contrastive.autograd import apply, needs_of, operator
from fastxattn.ops.contrastive.problem import Metrics, Problem
from fastxattn.ops.contrastive.reference import unit_rows, wide
from fastxattn.runtime.operators import derivative_wanted

Extra = tuple[torch.Tensor, torch.Tensor, torch.Tensor | int]
"""Further negatives of each row: their log-sum-exp, the sum of their logits, their number."""


def inverse_norms(x: torch.Tensor) -> torch.Tensor:
    """``1 / |x|`` per row in float32; 0 for a zero vector, which therefore stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float32)
    return torch.where(length > 1e-12, 1 / length, 0.0)


def dense_ids(ids: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same equalities in int32; negative ids become ids that equal nothing."""
    n = ids[0].shape[0]
    found, order = torch.cat(ids).sort()
    number = F.pad((found[1:] != found[:-1]).int(), (1, 0)).cumsum(0, dtype=torch.int32)[: order.shape[0]]
    dense = torch.empty_like(number).scatter(0, order, number)  # torch.unique has no shape for a compiler
    return dense[:n].where(ids[0] >= 0, -1).contiguous(), dense[n:].where(ids[1] >= 0, -3).contiguous()


class Sides:
    """What both losses prepare: ids, factors, and the exact logits of single positives."""

    def __init__(self, p: Problem, backend: str) -> None:
        """Derive the operator arguments from a checked problem."""
        self.p, self.backend = p, backend
        n, m, device = p.a.shape[0], p.b.shape[0], p.a.device
        self.norms = (inverse_norms(p.a), inverse_norms(p.b)) if p.normalize else (None, None)
        self.pairs = n > 0 and m > 0
        self.skips = (None, None) if p.ignore_ids is None or not self.pairs else dense_ids(p.ignore_ids)
        self.exact: torch.Tensor | None = None
        if p.groups is not None:
            self.id_a, self.id_b = dense_ids(p.groups)
            return
        rows = torch.arange(n, dtype=torch.int32, device=device)
        self.id_a = rows.where(rows < m, -1) if p.targets is None else p.targets.int()
        if p.exclude_self:  # an excluded pair is no positive: no limit, no rank and no mean comes from it
            self.id_a = self.id_a.where(self.id_a != rows, -1)
        self.id_b = torch.arange(m, dtype=torch.int32, device=device)
        if self.pairs:
            self.exact = self.positives(blocked=False)

    def positives(self, blocked: bool) -> torch.Tensor:
        """The logit of each row's positive: summed precisely, or as the blocks of the product round it.

        Without a positive it is 0, or infinity as a block's, which no negative reaches.
        """
        if not self.pairs:
            none = torch.inf if blocked else 0.0
            return torch.full(self.id_a.shape, none, dtype=torch.float32, device=self.p.a.device)
        bias = None if self.p.bias is None else self.p.bias.detach()
        result: torch.Tensor = operator("positive_logits", self.backend)(
            self.p.a.detach(), self.p.b.detach(), self.p.scale.detach(), bias, *self.norms, self.id_a, self.id_b,
            None, None, None, False, blocked,
        )  # fmt: skip
        return result

    def by_column(self, at: torch.Tensor) -> torch.Tensor:
        """Per column the value of its best positive; infinity where it has none."""
        m = self.p.b.shape[0]
        has = self.id_a >= 0
        slot = torch.where(has, self.id_a, m).long()
        highest = at.new_full((m + 1,), -torch.inf).scatter_reduce(0, slot, at, "amax")[:m]
        return torch.where(highest == -torch.inf, torch.inf, highest)


def infonce_fused(p: Problem, backend: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Metrics]]:
    """As :func:`fastxattn.ops.contrastive.reference.infonce_reference`, without the logits in memory."""
    sides = Sides(p, backend)
    if p.teacher is not None:
        return _distilled(p, sides), []
    limits: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    ranks: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if p.metrics or p.margin is not None:
        at = sides.positives(blocked=True)
        if p.metrics:
            ranks = (at, sides.by_column(at))
        if p.margin is not None:
            gap = p.scale.detach() * p.margin
            limits = (at + gap, sides.by_column(at) + gap)
    means = p.metrics or p.label_smoothing > 0
    a, b = _summed(p)
    row, col = apply(
        "pair_stats", backend, a, b, p.a, p.b, p.scale, None, *sides.norms, sides.id_a, sides.id_b, *sides.skips,
        sides.exact, p.exclude_self, *limits, *ranks, True, p.symmetric, means,
    )  # fmt: skip
    losses = [row_losses(row, p, _row_extras(p, a, sides, means))]
    if p.symmetric:
        losses.append(row_losses(col, p, _queue(p, b, p.b, p.queue_a, sides.norms[1], means, backend)))
    metrics = []
    if p.metrics:
        for stats, best in list(zip((row.detach(), col.detach()), ranks, strict=True))[: 1 + p.symmetric]:
            assert best is not None
            ahead = torch.where(best.isnan(), stats[4], stats[6])  # every negative is ahead of a positive that is NaN
            metrics.append(Metrics.of(1 + ahead, stats[2], stats[1], stats[5] > 0))
    return losses, metrics


def row_losses(stats: torch.Tensor, p: Problem, extras: list[Extra]) -> tuple[torch.Tensor, torch.Tensor]:
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


def _summed(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The features, in float32 where gradients of several parts of the loss add up on them."""
    if p.a is p.b:
        return (p.a.float(),) * 2
    several = p.hard_negatives is not None or p.queue_b is not None
    return p.a.float() if several else p.a, p.b if p.queue_a is None else p.b.float()


def _row_extras(p: Problem, a: torch.Tensor, sides: Sides, means: bool) -> list[Extra]:
    extras = _queue(p, a, p.a, p.queue_b, sides.norms[0], means, sides.backend)
    if p.hard_negatives is not None and p.hard_negatives.shape[1] > 0:
        hard = wide(p.hard_negatives)
        if p.normalize:
            a, hard = unit_rows(a), unit_rows(hard)
        logits = p.scale * torch.einsum("nd,nkd->nk", a, hard)
        extras.append((torch.logsumexp(logits, 1), logits.sum(1), logits.shape[1]))
    return extras


def _queue(
    p: Problem,
    wide: torch.Tensor,
    x: torch.Tensor,
    queue: torch.Tensor | None,
    norm: torch.Tensor | None,
    means: bool,
    backend: str,
) -> list[Extra]:
    if queue is None or queue.shape[0] == 0:
        return []
    ids = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
    queue_ids = torch.zeros(queue.shape[0], dtype=torch.int32, device=x.device)
    queue_norm = inverse_norms(queue) if p.normalize else None
    stats, _ = apply(
        "pair_stats", backend, wide, queue, x, queue, p.scale, None, norm, queue_norm, ids, queue_ids, None, None, None,
        False, *[None] * 4, True, False, means,
    )  # fmt: skip
    return [(stats[0], stats[1] * queue.shape[0], queue.shape[0])]


def _distilled(p: Problem, sides: Sides) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert p.teacher is not None
    nothing = torch.full((p.a.shape[0],), -1, dtype=torch.int32, device=p.a.device)
    # In float32: each feature's gradient is a difference of two parts, which must not be rounded before it is taken.
    a, b = p.a.float(), p.b.float()
    stats = apply(
        "pair_stats", sides.backend, a, b, a, b, p.scale, None, *sides.norms, nothing, sides.id_b, None, None, None,
        False, *[None] * 4, True, p.symmetric, False,
    )  # fmt: skip
    if p.normalize:
        a, b = unit_rows(a), unit_rows(b)
    teacher_a, teacher_b = p.teacher
    dots = [apply("soft_targets", a, b, p.scale, teacher_a, teacher_b)[0]]
    if p.symmetric:
        dots.append(apply("soft_targets", b, a, p.scale, teacher_b, teacher_a)[0])
    # Without candidates the log-sum-exp is -inf, and there is nothing to learn.
    lses = [torch.where(s[0] == -torch.inf, 0.0, s[0]) for s in stats]
    return [(lse - dot, torch.ones_like(dot, dtype=torch.bool)) for lse, dot in zip(lses, dots, strict=False)]


def sigmoid_fused(p: Problem, weight: torch.Tensor | None, backend: str) -> torch.Tensor:
    """Each row's loss, or with ``weight`` the weighted sum over rows in one pass with its gradients."""
    sides = Sides(p, backend)
    assert p.bias is not None
    problem = (
        p.a, p.b, p.scale, p.bias, *sides.norms, sides.id_a, sides.id_b, *sides.skips, sides.exact, p.exclude_self,
    )  # fmt: skip
    if weight is None:
        rows: torch.Tensor = apply("sigmoid_rows", backend, *problem)
        return rows
    needs = needs_of([derivative_wanted(t) for t in (p.a, p.b, p.scale, p.bias)])
    total: torch.Tensor = apply("sigmoid_sum", backend, needs, *problem, weight)[0]
    return total
