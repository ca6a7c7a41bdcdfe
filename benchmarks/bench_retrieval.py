"""Retrieval: ``python -m benchmarks.bench_retrieval [--full]``, against matmul + topk and, where installed, FAISS.

An int8 corpus is compared with the product of what it stands for in float32: plain PyTorch has no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.common import main, nbytes
from benchmarks.harness.registry import Case, Workload
from fastxattn.ops.retrieval import quantize_int8, topk_similarity


def case(rows: int, d: int, queries: int, k: int, int8: bool = False) -> Case:
    def build() -> Workload:
        corpus, query, scale = torch.randn(rows, d), torch.randn(queries, d), None
        stored = corpus
        if int8:
            stored, scale = quantize_int8(corpus)
            corpus = stored.float() * scale[:, None]

        def search() -> tuple[torch.Tensor, torch.Tensor]:
            return topk_similarity(query, stored, k, corpus_scale=scale, backend="cpu")

        def check() -> str:
            ours, theirs = search(), (query @ corpus.T).topk(k)
            agree = (ours[1] == theirs.indices).float().mean().item()
            return "ok" if agree > 0.999 else f"only {agree:.4f} of the rows agree"

        providers: dict[str, Callable[[], object]] = {
            "fastxattn cpu": search,
            "matmul + topk": lambda: (query @ corpus.T).topk(k),
        }
        try:
            import faiss
        except ImportError:
            pass
        else:
            index = faiss.IndexFlatIP(d)
            index.add(corpus.numpy())
            faiss.omp_set_num_threads(torch.get_num_threads())
            providers["faiss flat"] = lambda: index.search(query.numpy(), k)
        moved = nbytes(stored, query) + 12.0 * queries * k
        return Workload(providers, "matmul + topk", check, 2.0 * rows * d * queries, moved)

    name = f"top-{k} of {rows} x {d}{' int8' if int8 else ''}, {queries} queries"
    return Case("retrieval", name, "forward", torch.float32, build)


def cases(full: bool) -> Iterator[Case]:
    """Many queries, one query, float32 and int8, and with ``full`` a million rows."""
    yield case(200_000, 256, 64, 10)
    yield case(200_000, 256, 1, 10)
    yield case(200_000, 256, 64, 10, int8=True)
    yield case(200_000, 256, 1, 10, int8=True)
    if full:
        yield case(1_000_000, 256, 64, 10)


if __name__ == "__main__":
    main("retrieval", cases)
