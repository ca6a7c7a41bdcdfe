"""Random problems of every operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastxattn
from benchmarks.soak.losses import losses
from benchmarks.soak.models import model
from benchmarks.soak.modules import MODULES
from benchmarks.soak.pruning import PRUNING
from benchmarks.soak.trials import Draw, Maker, Trial
from fastxattn.ops.pruning import backends as pruning
from fastxattn.ops.pruning.merge import best_match
from fastxattn.ops.pruning.problem import DETERMINANT, MAX_MIN, Greedy, Quantile
from fastxattn.ops.pruning.rows import gather_rows, merge_rows
from fastxattn.ops.retrieval.api import quantize_int8
from fastxattn.testing import offsets

Inputs = dict[str, Tensor]


def padded_attention(d: Draw) -> Trial:
    """``cross_attention`` with masks of any pattern."""
    batch, kv_heads, dim = d.r.randint(1, 3), d.of(1, 2), d.of(8, 33, 64)
    heads, (n, m) = kv_heads * d.of(1, 2), (d.size(1, 5, 33, 77, 200) for _ in range(2))
    inputs = {"query": d.rows(batch, n, heads, dim), "bias": d.rows(1, heads, n, m).float()}
    inputs |= {name: d.rows(batch, m, kv_heads, dim) for name in ("key", "value")}
    if d.often(0.6):
        del inputs["bias"]
    masks = {}
    for name, length in (("query_mask", n), ("key_mask", m)):
        kind = d.of("none", "prefix", "any")
        if kind == "prefix":
            masks[name] = torch.arange(length) < d.integers(0, length + 1, batch)[:, None]
        elif kind == "any":
            masks[name] = d.chance(batch * length, 0.6).view(batch, length)

    def run(x: Inputs, backend: str) -> Any:
        return fastxattn.cross_attention(
            x["query"], x["key"], x["value"], bias=x.get("bias"), **masks, return_lse=True, backend=backend
        )

    return Trial(f"{batch} x {n} x {m}, {heads}/{kv_heads} x {dim}, {[*inputs]}, {[*masks]}", d.dtype, inputs, run)


def importance(d: Draw) -> Trial:
    batch, heads, dim = d.r.randint(1, 4), d.of(1, 2, 4), d.of(3, 16, 64, 80)
    of_q, of_k = d.lengths(batch), d.lengths(batch)
    options: dict[str, Any] = {"reduction": d.of("mean", "sum", "max", "none"), "normalize": d.often(0.3)}
    if options["reduction"] == "max":  # heads tie on a key that is alone, and any of them may take its gradient
        of_k = [n + (n == 1) for n in of_k]
    inputs = {"query": d.rows(sum(of_q), heads, dim), "key": d.rows(sum(of_k), heads, dim)}
    cu_q, cu_k, softcap = offsets(of_q), offsets(of_k), d.of(0.0, 0.0, 5.0)
    wide = [inputs[n].double() for n in ("query", "key", "key")]
    _, lse = fastxattn.varlen_cross_attention(*wide, cu_q, cu_k, softcap=softcap, return_lse=True, backend="reference")
    if d.often(0.3):
        inputs["row_weight"] = torch.randn(sum(of_q), generator=d.g)

    def run(x: Inputs, backend: str) -> Tensor:
        wanted = lse if x["query"].dtype == torch.float64 else lse.float()
        weight = x.get("row_weight")
        return fastxattn.key_importance(
            x["query"], x["key"], wanted, cu_q, cu_k, softcap=softcap, row_weight=weight, backend=backend, **options
        )

    said = [*options.values(), softcap, "row_weight" in inputs]
    return Trial(f"{of_q} x {of_k}, {heads} x {dim}, {said}", d.dtype, inputs, run)


def co_attention(d: Draw) -> Trial:
    batch, heads, dim = d.r.randint(1, 3), d.of(1, 2, 4), d.of(8, 33, 64)
    of_a, of_b = d.lengths(batch), d.lengths(batch)
    inputs = {
        f"{what}_{side}": d.rows(sum(of), heads, dim)
        for what in ("query", "value")
        for side, of in (("a", of_a), ("b", of_b))
    }
    if d.often(0.3):
        inputs["key_bias_b"] = torch.randn(sum(of_b), generator=d.g)
    softcap = d.of(0.0, 0.0, 3.0)

    def run(x: Inputs, backend: str) -> Any:
        sides = [x[name] for name in ("query_a", "query_b", "value_a", "value_b")]
        bias = x.get("key_bias_b")
        return fastxattn.co_attention(
            *sides, offsets(of_a), offsets(of_b), softcap=softcap, key_bias_b=bias, backend=backend
        )

    return Trial(f"{of_a} x {of_b}, {heads} x {dim}, {softcap}, {'key_bias_b' in inputs}", d.dtype, inputs, run)


def context(d: Draw) -> Trial:
    batch, heads, width = d.r.randint(1, 3), d.of(1, 3, 8), d.of(16, 48, 96, 130)
    of_q, of_k = d.lengths(batch, 65), d.lengths(batch)
    inputs = {"query": d.rows(sum(of_q), heads, width), "context": d.rows(sum(of_k), width)}
    cu_q, cu_k, scale = offsets(of_q), offsets(of_k), width**-0.5

    def run(x: Inputs, backend: str) -> Any:
        return fastxattn.absorbed_attention(
            x["query"], x["context"], cu_q, cu_k, scale=scale, return_lse=True, backend=backend
        )

    return Trial(f"{of_q} x {of_k}, {heads} x {width}", d.dtype, inputs, run)


def topk(d: Draw) -> Trial:
    """Whole numbers: every product is exact, ties abound, and order is decided."""
    n, m, width = d.size(0, 1, 7, 65), d.size(0, 1, 50, 1000), d.of(1, 16, 63)
    queries, corpus = (d.integers(-3, 4, rows, width).to(d.dtype) for rows in (n, m))
    k, scale = d.r.randint(1, 9), None
    if d.often(0.3):
        corpus, scale = corpus.to(torch.int8), torch.full((m,), 0.5)

    def run(x: Inputs, backend: str) -> Any:
        return fastxattn.topk_similarity(queries, corpus, k, corpus_scale=scale, backend=backend)

    return Trial(f"{n} of {m} x {width}, k={k}, {corpus.dtype}", d.dtype, {}, run, exact=True)


def topk_scores(d: Draw) -> Trial:
    """Scores alone, on numbers of any kind and on quantized ones: where two are close, either row may come first."""
    n, m, width, k = d.size(1, 7, 65), d.size(9, 50, 1000), d.of(1, 16, 63), d.r.randint(1, 9)
    queries, corpus, scale = d.rows(n, width), d.rows(m, width), None
    if d.often(0.4):
        corpus, scale = quantize_int8(corpus)
    metric = d.of("inner", "cosine")

    def run(x: Inputs, backend: str) -> Tensor:
        rows = corpus if scale is not None else corpus.to(x["queries"].dtype)
        return fastxattn.topk_similarity(x["queries"], rows, k, metric=metric, corpus_scale=scale, backend=backend)[0]

    return Trial(f"{n} of {m} x {width}, k={k}, {metric}, {corpus.dtype}", d.dtype, {"queries": queries}, run)


def select(d: Draw) -> Trial:
    of = d.lengths(d.r.randint(1, 6))
    scores = d.integers(-3, 4, sum(of)).float()
    scores[d.chance(sum(of), 0.1)] = torch.nan
    budget = d.of(fastxattn.Budget.count(5), fastxattn.Budget.ratio(0.3), fastxattn.Budget.total(40))
    protected = d.chance(sum(of), 0.1)

    def run(x: Inputs, backend: str) -> Any:
        kept = fastxattn.select_tokens(scores, offsets(of), budget, protected=protected, backend=backend)
        return kept.keep_index, kept.cu_seqlens, kept.assignment

    return Trial(f"{of}, {budget}", d.dtype, {}, run, exact=True)


def gather_merge(d: Draw) -> Trial:
    n, kept, width = d.size(1, 30, 200), d.size(1, 20, 120), d.of(1, 17, 64)
    index, assignment = d.integers(-1, n, kept).int(), d.integers(-1, kept, n).int()
    inputs = {"x": d.rows(n, width), "weight": torch.rand(n, generator=d.g), "factor": torch.rand(kept, generator=d.g)}

    def run(x: Inputs, backend: str) -> Any:
        return (
            gather_rows(x["x"], index, x["factor"], backend=backend),
            merge_rows(x["x"], assignment, x["weight"], kept, backend=backend),
        )

    return Trial(f"{n} -> {kept}, D={width}", d.dtype, inputs, run)


def match(d: Draw) -> Trial:
    batch, width = d.r.randint(1, 4), d.of(3, 17, 64)
    of_a, of_b = d.lengths(batch, 65), d.lengths(batch, 65)
    total = sum(of_a) + sum(of_b)
    x, order = d.rows(total, width), torch.randperm(total, generator=d.g).int()
    a, b = order[: sum(of_a)], order[sum(of_a) :]

    def run(_: Inputs, backend: str) -> Tensor:
        return best_match(x, a, offsets(of_a), b, offsets(of_b), backend=backend)[0]

    return Trial(f"{of_a} x {of_b}, D={width}", d.dtype, {}, run, exact=True)


def greedy(d: Draw) -> Trial:
    of, width = d.lengths(d.r.randint(1, 3), 65), d.of(8, 17, 64)
    x, quality = d.rows(sum(of), width), torch.rand(sum(of), generator=d.g) + 0.5
    counts = torch.tensor([d.r.randint(0, min(n, 12)) for n in of], dtype=torch.int32)
    mode, protected = d.of(MAX_MIN, DETERMINANT), d.chance(sum(of), 0.05) if d.often(0.3) else None

    def run(_: Inputs, backend: str) -> Any:
        return pruning.run(Greedy.of((x, quality, offsets(of), counts, protected, mode, 12)), backend)

    return Trial(f"{of}, keep {counts.tolist()}, mode {mode}, D={width}", d.dtype, {}, run, exact=True)


def quantile(d: Draw) -> Trial:
    of = d.lengths(d.r.randint(1, 6))
    scores, q = torch.randn(sum(of), generator=d.g), torch.rand(3, generator=d.g)
    scores[d.chance(sum(of), 0.1)] = torch.nan

    def run(x: Inputs, backend: str) -> Any:
        return pruning.run(Quantile(scores=x["scores"].detach(), cu_seqlens=offsets(of), q=q), backend)

    return Trial(f"{of}, {q.tolist()}", torch.float32, {"scores": scores}, run)


MAKERS: dict[str, Maker] = {
    "padded attention": padded_attention,
    "importance": importance,
    "co_attention": co_attention,
    "absorbed_attention": context,
    **losses(few=False),
    "topk": topk,
    "topk scores": topk_scores,
    "select": select,
    "gather and merge": gather_merge,
    "match": match,
    "greedy": greedy,
    "quantile": quantile,
    **PRUNING,
    **MODULES,
    "model": model,
}
OPTIONS: dict[str, Maker] = {f"{name}, few rows": maker for name, maker in losses(few=True).items()}
"""Small problems with all of an operation's options: the soak's part ``options`` tries at least 10 000."""
NO_TRITON = ("absorbed_attention", "model")
"""Operations without a kernel for it, and what takes the interpreter too long."""
