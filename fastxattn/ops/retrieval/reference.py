"""The readable oracle of retrieval: every score, then a stable sort."""

from __future__ import annotations

import torch


def topk_reference(
    queries: torch.Tensor, corpus: torch.Tensor, factor: torch.Tensor | None, k: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the operator's schema says; of equal scores the first row comes first, NaN ranks above everything."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = queries.to(dtype) @ corpus.to(dtype).T
    if factor is not None:
        scores = scores * factor.to(dtype)
    order = scores.sort(dim=1, descending=True, stable=True)
    values, indices = order.values[:, :k], order.indices[:, :k] + first
    missing = k - values.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    return values, indices
