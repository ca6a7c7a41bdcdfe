"""The readable oracle of late interaction: one similarity matrix per pair of sets, differentiated by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.late_interaction.problem import Problem, smooth_of
from fastxattn.runtime.autocast import no_autocast


def best_match(similarity: Tensor, smooth: float | None) -> Tensor:
    """Each row's maximum, or its smooth maximum ``smooth * logsumexp(row / smooth)``; 0 for an empty row."""
    if similarity.shape[1] == 0:
        return similarity.sum(1)
    if smooth is None:
        return similarity.max(dim=1).values
    return smooth * torch.logsumexp(similarity / smooth, dim=1)


def maxsim_reference(p: Problem) -> tuple[Tensor, Tensor]:
    """Sums of best matches (N, M) from a's tokens and from b's; a direction not asked for is (0, M)."""
    with no_autocast(p.a.device):
        a, b = (p.a, p.b) if p.a.dtype == torch.float64 else (p.a.float(), p.b.float())
        sets_a, sets_b = (
            [x[s:e] for s, e in zip(cu.tolist(), cu.tolist()[1:], strict=False)] for x, cu in ((a, p.cu_a), (b, p.cu_b))
        )
        n, m = p.sets
        pairs = [x @ y.T for x in sets_a for y in sets_b]
        anchor = (a[:0].sum() + b[:0].sum()).expand(0)  # keeps the graph when there is no pair

        def table(similarities: list[Tensor], asked: bool) -> Tensor:
            if not asked:
                return a.new_zeros((0, m))
            found = [best_match(s, smooth_of(p)).sum() for s in similarities]
            return (torch.stack(found) if found else anchor).reshape(n, m)

        return table(pairs, p.from_a), table([s.T for s in pairs], p.from_b)
