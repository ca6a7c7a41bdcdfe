"""Backends of retrieval: which runs a search, why not the others, and how each one runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.contrastive.checks import computed_in
from fastxattn.ops.retrieval import operator  # noqa: F401  (defines the operators)
from fastxattn.ops.retrieval.problem import Problem
from fastxattn.ops.retrieval.reference import topk_reference
from fastxattn.runtime import reasons
from fastxattn.runtime.backend import Backend, resolve

MOST = 128  # a query's list lives in the Triton kernel's registers


def supports_triton(p: Problem) -> str | None:
    """Why the Triton kernel does not run this problem; None when it does."""
    if (reason := reasons.triton(p.corpus)) is not None:
        return reason
    return f"it needs k up to {MOST}, got {p.k}" if p.k > MOST else reasons.exported("retrieval")


def _run(backend: str, p: Problem) -> tuple[Tensor, Tensor]:
    corpus = p.corpus if p.corpus.stride(1) == 1 or p.corpus.shape[1] == 1 else p.corpus.contiguous()
    factor = None if p.factor is None else p.factor.contiguous()
    p = p.replace(queries=p.queries.contiguous(), corpus=corpus, factor=factor)
    found: tuple[Tensor, Tensor] = getattr(torch.ops.fastxattn, f"topk_similarity_{backend}")(*p.values())
    return found


BACKENDS = (
    Backend("cpu", lambda p: reasons.cpu(p.corpus), lambda p: _run("cpu", p)),
    Backend("triton", supports_triton, lambda p: _run("triton", p)),
    Backend("reference", lambda p: None, topk_reference),
)
"""In the order in which ``auto`` tries them."""
reasons.at_first_call(
    "topk_similarity_triton", ("CUDA", "CPU"), "fastxattn.ops.retrieval.kernels_triton", "topk_similarity"
)


def run(p: Problem, metric: str, requested: str) -> tuple[Tensor, Tensor]:
    """The results of ``p``, whose factor is the caller's, under a metric."""
    name = resolve("topk_similarity", BACKENDS, p, requested)
    query = p.queries if name == "reference" and p.queries.dtype == torch.float64 else p.queries.float()
    factor = None if p.factor is None else p.factor.to(query.dtype)
    if metric == "cosine":
        query = query / torch.linalg.vector_norm(query, dim=1, keepdim=True).clamp(min=1e-12)
        length = _lengths(p.corpus, computed_in(query.dtype))
        factor = torch.where(length > 0, 1 / length, 0.0)  # a row's own scale cancels
    chosen = next(backend for backend in BACKENDS if backend.name == name)
    found: tuple[Tensor, Tensor] = chosen.run(p.replace(queries=query, factor=factor))
    return found


def _lengths(corpus: Tensor, dtype: torch.dtype) -> Tensor:
    """Row lengths in ``dtype``, a slice at a time so that an integer corpus is never widened as a whole."""
    parts = [torch.linalg.vector_norm(part.to(dtype), dim=1) for part in corpus.split(65536)]
    return torch.cat(parts) if parts else corpus.new_zeros(0, dtype=dtype)
