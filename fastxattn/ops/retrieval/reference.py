"""The readable oracle of retrieval: every score, then a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.retrieval.problem import Problem
from fastxattn.runtime.autocast import no_autocast


def topk_reference(p: Problem) -> tuple[Tensor, Tensor]:
    """Scores and rows as the operator returns them; of equal scores the first row comes first, NaN before all."""
    dtype = torch.float64 if p.queries.dtype == torch.float64 else torch.float32
    with no_autocast(p.corpus.device):
        scores = p.queries.to(dtype) @ p.corpus.to(dtype).T
    if p.factor is not None:
        scores = scores * p.factor.to(dtype)
    order = scores.sort(dim=1, descending=True, stable=True)
    values, indices = order.values[:, : p.k], order.indices[:, : p.k] + p.first
    missing = p.k - values.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    return values, indices
