"""The readable oracle of late interaction: one similarity matrix per pair of sets, differentiated by torch."""

from __future__ import annotations

import torch

from fastxattn.ops.late_interaction.problem import Problem


def supports(problem: Problem) -> str | None:
    """None when the reference runs this problem, else why not."""
    return "reads the offsets; on the meta device there are none" if problem.device == "meta" else None


def best_match(similarity: torch.Tensor, smooth: float | None) -> torch.Tensor:
    """Each row's maximum, or its smooth maximum ``smooth * logsumexp(row / smooth)``; 0 for an empty row."""
    if similarity.shape[1] == 0:
        return similarity.sum(1)
    if smooth is None:
        return similarity.max(dim=1).values
    return smooth * torch.logsumexp(similarity / smooth, dim=1)


def maxsim_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    cu_a: torch.Tensor,
    cu_b: torch.Tensor,
    from_a: bool,
    from_b: bool,
    smooth: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of best matches (N, M) from a's tokens and from b's; a direction not asked for is (0, M)."""
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    sets_a = [a[s:e] for s, e in zip(cu_a.tolist(), cu_a.tolist()[1:], strict=False)]
    sets_b = [b[s:e] for s, e in zip(cu_b.tolist(), cu_b.tolist()[1:], strict=False)]
    n, m = len(sets_a), len(sets_b)
    pairs = [x @ y.T for x in sets_a for y in sets_b]
    anchor = (a[:0].sum() + b[:0].sum()).expand(0)  # keeps the graph when there is no pair

    def table(matches: list[torch.Tensor], wanted: bool) -> torch.Tensor:
        if not wanted:
            return a.new_zeros((0, m))
        return (torch.stack([x.sum() for x in matches]) if matches else anchor).reshape(n, m)

    return (
        table([best_match(s, smooth) for s in pairs] if from_a else [], from_a),
        table([best_match(s.T, smooth) for s in pairs] if from_b else [], from_b),
    )
