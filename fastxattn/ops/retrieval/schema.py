"""Operator schema of retrieval: best ``k`` corpus rows of each query, scores descending.

``queries`` (Q, D) float32; ``corpus`` (R, D) float32, bfloat16, float16 or int8; ``factor`` (R,) float32 multiplies a
row's scores; ``first`` is added to indices. Returns scores (Q, k) float32 and indices (Q, k) int64; where the corpus
has fewer than k rows, -inf and -1.
"""

from __future__ import annotations

import torch

from fastxattn.runtime.operators import define

_SCHEMA = "(Tensor queries, Tensor corpus, Tensor? factor, int k, int first) -> (Tensor scores, Tensor indices)"


def _topk_fake(
    queries: torch.Tensor, corpus: torch.Tensor, factor: torch.Tensor | None, k: int, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = queries.new_empty((queries.shape[0], k), dtype=torch.float32)
    return scores, queries.new_empty((queries.shape[0], k), dtype=torch.int64)


for _backend in ("cpu", "triton"):
    define(f"topk_similarity_{_backend}", _SCHEMA, _topk_fake)
