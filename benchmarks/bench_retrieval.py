"""Retrieval: ``python -m benchmarks.bench_retrieval [--full]``, against matmul + topk and, where installed, FAISS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.common import main
from fastxattn.bench.registry import Case, Workload
from fastxattn.ops.retrieval import topk_similarity


def case(rows: int, d: int, queries: int, k: int) -> Case:
    def build() -> Workload:
        corpus, query = torch.randn(rows, d), torch.randn(queries, d)

        def check() -> str:
            ours, theirs = topk_similarity(query, corpus, k, backend="cpu"), (query @ corpus.T).topk(k)
            agree = (ours[1] == theirs.indices).float().mean().item()
            return "ok" if agree > 0.999 else f"only {agree:.4f} of the rows agree"

        providers: dict[str, Callable[[], object]] = {
            "fastxattn cpu": lambda: topk_similarity(query, corpus, k, backend="cpu"),
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
        return Workload(providers, "matmul + topk", check, 2.0 * rows * d * queries)

    return Case("retrieval", f"top-{k} of {rows} x {d}, {queries} queries", "forward", torch.float32, build)


def cases(full: bool) -> Iterator[Case]:
    """Many queries, one query, and with ``full`` a million rows."""
    yield case(200_000, 256, 64, 10)
    yield case(200_000, 256, 1, 10)
    if full:
        yield case(1_000_000, 256, 64, 10)


if __name__ == "__main__":
    main("retrieval", cases)
