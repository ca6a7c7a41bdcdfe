"""Public functions of retrieval: validation, then dispatch, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastxattn.ops.contrastive.checks import features
from fastxattn.ops.retrieval import checks
from fastxattn.ops.retrieval.backends import run
from fastxattn.ops.retrieval.problem import Problem
from fastxattn.runtime.operators import derivative_wanted

if TYPE_CHECKING:
    import numpy

CHUNK_BYTES = 1 << 28  # of a memory-mapped corpus held at once


def topk_similarity(
    queries: torch.Tensor,
    corpus: torch.Tensor | numpy.memmap,
    k: int,
    *,
    metric: str = "inner",
    corpus_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the ``k`` most similar corpus rows of every query, without the (queries, corpus) score matrix.

    Args:
        queries: (Q, D) floating point. Scores are computed in float32 (float64 for float64 queries on the reference
            backend), under autocast too: nothing is rounded to its dtype.
        corpus: (R, D) float32, bfloat16, float16 or int8; or a ``numpy.memmap`` (float32, float16 or int8), which is
            read in chunks and may be larger than memory.
        k: how many, at least 1.
        metric: ``inner`` product, or ``cosine`` (a zero vector scores 0).
        corpus_scale: (R,) factor of each row on the device of ``queries``, for int8 rows made by
            :func:`quantize_int8`.
        backend: ``auto``, ``cpu``, ``triton`` or ``reference``.

    Returns:
        Scores (Q, k) float32, descending, and int64 row indices. Of equal scores the first row comes first. Where the
        corpus has fewer than ``k`` rows: -inf and -1. Scores are differentiable any number of times in ``queries``,
        ``corpus`` (not a memmap) and ``corpus_scale``, through the rows found, which are gathered for it, (Q, k, D);
        the choice of rows has no gradient, nor has a missing row.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: the backend asked for cannot run this problem.
    """
    checks.check_arguments(queries, corpus, k, metric, corpus_scale)
    k = int(k)
    if isinstance(corpus, torch.Tensor):
        scores, indices = _search(queries, corpus, k, metric, corpus_scale, 0, backend)
        if derivative_wanted(queries, corpus, corpus_scale) or _maybe_transformed():
            scores = _with_derivative(scores, indices, queries, corpus, corpus_scale, metric)
        return scores, indices
    total, width = corpus.shape
    rows = max(1, CHUNK_BYTES // (width * corpus.dtype.itemsize))
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for first in range(0, max(total, 1), rows):
        chunk = _as_tensor(corpus[first : first + rows])
        scale = None if corpus_scale is None else corpus_scale[first : first + rows]
        found = _search(queries, chunk, k, metric, scale, first, backend)
        best = found if best is None else _merge(best, found, k)
    assert best is not None
    scores, indices = best
    if total and derivative_wanted(queries, corpus_scale):
        chosen, places = torch.unique(indices.clamp(min=0), return_inverse=True)
        places = torch.where(indices < 0, -1, places)
        kept = None if corpus_scale is None else corpus_scale[chosen]
        scores = _with_derivative(scores, places, queries, _as_tensor(corpus[chosen.numpy()]), kept, metric)
    return scores, indices


def _maybe_transformed() -> bool:
    """Whether a ``torch.func`` transform may be compiled around the call, of which a trace of it shows nothing."""
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


def _with_derivative(
    scores: torch.Tensor,
    rows: torch.Tensor,
    queries: torch.Tensor,
    corpus: torch.Tensor,
    scale: torch.Tensor | None,
    metric: str,
) -> torch.Tensor:
    """``scores`` as they are, with the derivative of plain PyTorch's similarity of these rows."""
    if corpus.shape[0] == 0:
        return scores
    chosen, at = rows.clamp(min=0), scores.dtype
    left, right = queries.to(at)[:, None], corpus[chosen].to(at)  # (Q, 1, D) and (Q, k, D)
    if metric == "cosine":
        left, right = _unit(left), _unit(right)
    again = (left * right).sum(-1)
    if scale is not None and metric != "cosine":  # under cosine a row's own scale cancels
        again = again * scale.to(at)[chosen]
    # The difference is 0: it adds a derivative and no rounding, so that scores stay in descending order.
    return torch.where((rows >= 0) & again.isfinite(), scores + (again - again.detach()), scores)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1; a zero vector stays zero, with a zero gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0)


def _as_tensor(chunk: numpy.ndarray) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.array(chunk))  # a copy: the file is mapped read-only


def _merge(
    left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both lists as one; left's rows come first, so a stable sort keeps the tie rule."""
    scores = torch.cat([left[0], right[0]], 1)
    rows = torch.cat([left[1], right[1]], 1)
    # An empty place must not come before a row whose score is -inf.
    order = torch.where(rows < 0, 1, 0).argsort(dim=1, stable=True)
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    sorted_scores = scores.sort(dim=1, descending=True, stable=True)
    return sorted_scores.values[:, :k], rows.gather(1, sorted_scores.indices[:, :k])


def _search(
    queries: torch.Tensor,
    corpus: torch.Tensor,
    k: int,
    metric: str,
    scale: torch.Tensor | None,
    first: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_rows(corpus, queries)
    problem = Problem(
        queries=queries.detach(),
        corpus=corpus.detach(),
        factor=None if scale is None else scale.detach(),
        k=k,
        first=first,
    )
    return run(problem, metric, backend)


def quantize_int8(corpus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``corpus`` (R, D) to int8 rows with float32 scales (R,): ``row ~ int8 * scale``."""
    features("corpus", corpus)
    scale = corpus.float().abs().amax(1).clamp(min=1e-12) / 127
    return (corpus.float() / scale[:, None]).round().to(torch.int8), scale


def recall_at_k(
    a: torch.Tensor, b: torch.Tensor, ks: Sequence[int] = (1, 5, 10), *, metric: str = "cosine", backend: str = "auto"
) -> dict[str, float]:
    """Compute recall of paired features in both directions; row ``i`` of ``a`` belongs to row ``i`` of ``b``.

    Args:
        a: (N, D).
        b: (N, D).
        ks: how many results may be looked at; each at least 1.
        metric: ``inner`` or ``cosine``.
        backend: see :func:`topk_similarity`.

    Returns:
        ``{"a->b@1": ..., "b->a@1": ..., ...}``: the share of rows whose partner is among the first k.

    Raises:
        ValueError: the sides differ in rows, ``ks`` is empty, or one of them is no whole number of at least 1.
    """
    checks.check_pairs(a, b, ks)
    own = torch.arange(a.shape[0], device=a.device)[:, None]
    result: dict[str, float] = {}
    for name, x, y in (("a->b", a, b), ("b->a", b, a)):
        hits = topk_similarity(x, y, max(ks), metric=metric, backend=backend)[1] == own
        for k in ks:
            result[f"{name}@{k}"] = hits[:, :k].any(1).double().mean().item() if a.shape[0] else 0.0
    return result
