"""Rows of the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastxattn as fx
from fastxattn import PackedTokens
from fastxattn.ops.pruning import gather_rows, merge_rows
from fastxattn.testing import offsets
from tests.compositions.row import DIM, HEADS, LOSS, Inputs, Make, Row, lengths, mask, only, ranges

# Attention ---------------------------------------------------------------------------------------------------------


def packed(m: Make, size: int) -> Inputs:
    """Query, key and value with their offsets."""
    of_q, of_k = lengths(size)
    return {
        "query": m.rows(sum(of_q), HEADS, DIM),
        "key": m.rows(sum(of_k), HEADS, DIM),
        "value": m.rows(sum(of_k), HEADS, DIM),
        "cu_q": offsets(of_q),
        "cu_k": offsets(of_k),
    }


def packed_options(m: Make, size: int) -> Inputs:
    """With a range, a bias and rows picked by an index."""
    of_q, of_k = lengths(size)
    order = torch.randperm(sum(of_k), generator=m.g).int()
    return packed(m, size) | {"key_bias": m.rows(sum(of_k)), "kv_range": ranges(of_q, of_k), "key_index": order}


def attention(_: Any, x: Inputs) -> Any:
    return fx.varlen_cross_attention(x["query"], x["key"], x["value"], x["cu_q"], x["cu_k"])


def attention_options(_: Any, x: Inputs) -> Any:
    out, lse = fx.varlen_cross_attention(
        x["query"],
        x["key"],
        x["value"],
        x["cu_q"],
        x["cu_k"],
        scale=0.4,
        softcap=3.0,
        kv_range=x["kv_range"],
        key_bias=x["key_bias"],
        key_index=x["key_index"],
        dropout_p=0.2,
        dropout_seed=7,
        return_lse=True,
    )
    return out, lse.clamp(min=-50)  # a query that sees no key has -inf, which no cotangent may meet


def padded(m: Make, size: int) -> Inputs:
    """Two padded sides with masks and a bias."""
    of_q, of_k = lengths(size)
    b, lq, lk = len(of_q), max(of_q), max(of_k)
    return {
        "query": m.rows(b, lq, HEADS, DIM),
        "key": m.rows(b, lk, HEADS, DIM),
        "value": m.rows(b, lk, HEADS, DIM),
        "bias": m.rows(1, HEADS, lq, lk),
        "query_mask": mask(of_q),
        "key_mask": mask(of_k),
    }


def cross_attention(_: Any, x: Inputs) -> Any:
    return fx.cross_attention(
        x["query"], x["key"], x["value"], query_mask=x["query_mask"], key_mask=x["key_mask"], bias=x["bias"]
    )


def both_sides(m: Make, size: int) -> Inputs:
    """Co-attention."""
    of_a, of_b = lengths(size)
    a, b = sum(of_a), sum(of_b)
    return {
        "query_a": m.rows(a, HEADS, DIM),
        "query_b": m.rows(b, HEADS, DIM),
        "value_a": m.rows(a, HEADS, DIM),
        "value_b": m.rows(b, HEADS, DIM),
        "key_bias_b": m.rows(b),
        "cu_a": offsets(of_a),
        "cu_b": offsets(of_b),
    }


def co_attention(_: Any, x: Inputs) -> Any:
    return fx.co_attention(
        x["query_a"], x["query_b"], x["value_a"], x["value_b"], x["cu_a"], x["cu_b"], key_bias_b=x["key_bias_b"]
    )


def features(m: Make, size: int) -> Inputs:
    """Absorbed attention."""
    of_q, of_k = lengths(size)
    return {
        "query": m.rows(sum(of_q), HEADS, DIM),
        "context": m.rows(sum(of_k), DIM),
        "key_bias": m.rows(sum(of_k)),
        "cu_q": offsets(of_q),
        "cu_k": offsets(of_k),
    }


def absorbed_attention(_: Any, x: Inputs) -> Any:
    out, lse = fx.absorbed_attention(
        x["query"], x["context"], x["cu_q"], x["cu_k"], scale=0.3, key_bias=x["key_bias"], return_lse=True
    )
    return out, lse.clamp(min=-50)


def scored(m: Make, size: int) -> Inputs:
    """Importance, with a log-sum-exp of its own."""
    x = packed(m, size)
    x["lse"] = m.rows(HEADS, x["query"].shape[0]).abs() + 2
    x["row_weight"] = m.positive(x["query"].shape[0])
    return {name: t for name, t in x.items() if name != "value"}


def importance(_: Any, x: Inputs) -> Any:
    return fx.key_importance(x["query"], x["key"], x["lse"], x["cu_q"], x["cu_k"], row_weight=x["row_weight"])


def builders(m: Make, size: int) -> Inputs:
    """Ranges."""
    of_q, of_k = lengths(size)
    times = [torch.sort(m.rows(n)).values for n in of_k]
    return {
        "cu_q": offsets(of_q),
        "cu_k": offsets(of_k),
        "query_times": m.rows(sum(of_q)),
        "key_times": torch.cat(times),
        "media": m.rows(sum(of_q)) > 0,
    }


def all_ranges(_: Any, x: Inputs) -> Any:
    cu_q, cu_k, total = x["cu_q"], x["cu_k"], x["media"].shape[0]
    return (
        fx.ranges.causal_kv_range(cu_q, cu_k, total),
        fx.ranges.sliding_window_kv_range(cu_q, cu_k, 1, 1, total),
        fx.ranges.media_kv_range(x["media"], cu_q, 2),
        fx.ranges.timestamp_kv_range(x["query_times"], x["key_times"], cu_q, cu_k, 0.5),
    )


# Losses ------------------------------------------------------------------------------------------------------------


def pairs(m: Make, size: int) -> Inputs:
    """Features of both sides, scale and bias."""
    n = 6 if size == 0 else 9
    scale = {"scale": torch.tensor(3.0), "bias": torch.tensor(-1.0)}
    return {"a": m.unit(n, DIM), "b": m.unit(n, DIM), **scale}


def scaled(m: Make, size: int) -> Inputs:
    return {name: t for name, t in pairs(m, size).items() if name != "bias"}


def negatives(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    n = x["a"].shape[0]
    return x | {
        "hard": m.unit(n, 2, DIM),
        "image_queue": m.unit(5, DIM),
        "text_queue": m.unit(4, DIM),
        "weights": m.positive(n),
        "ids": torch.arange(n) // 2,
    }


def taught(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    n = x["a"].shape[0]
    return x | {"teacher_a": m.unit(n, 4), "teacher_b": m.unit(n, 4)}


def grouped(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    return x | {"groups": torch.arange(x["a"].shape[0]) // 3}


def targeted(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    return x | {"targets": torch.arange(x["a"].shape[0]).flip(0)}


def infonce(_: Any, x: Inputs) -> Any:
    return fx.infonce_loss(x["a"], x["b"], x["scale"])


def infonce_options(_: Any, x: Inputs) -> Any:
    return fx.infonce_loss(
        x["a"],
        x["b"],
        x["scale"],
        hard_negatives=x["hard"],
        image_queue=x["image_queue"],
        text_queue=x["text_queue"],
        ignore_ids=x["ids"],
        weights=x["weights"],
        label_smoothing=0.1,
        normalize=True,
    )


def multi_positive(_: Any, x: Inputs) -> Any:
    return fx.multi_positive_infonce_loss(x["a"], x["b"], x["scale"], groups=x["groups"])


def distillation(_: Any, x: Inputs) -> Any:
    teacher = {"teacher_image_features": x["teacher_a"], "teacher_text_features": x["teacher_b"]}
    return fx.distillation_loss(x["a"], x["b"], x["scale"], **teacher, teacher_logit_scale=2.0)


def infonce_metrics(_: Any, x: Inputs) -> Any:
    loss, metrics = fx.infonce_loss(x["a"], x["b"], x["scale"], targets=x["targets"], return_metrics=True)
    return (loss, *(m.rank for m in metrics))


def sigmoid(reduction: str, weighted: bool = False) -> Callable[[Any, Inputs], Any]:
    def call(_: Any, x: Inputs) -> Any:
        weights = x["weights"] if weighted else None
        return fx.sigmoid_loss(x["a"], x["b"], x["scale"], x["bias"], reduction=reduction, weights=weights)

    return call


def weighted(m: Make, size: int) -> Inputs:
    x = pairs(m, size)
    return x | {"weights": m.positive(x["a"].shape[0])}


def sets(m: Make, size: int) -> Inputs:
    """Token sets of both sides."""
    of_a, of_b = ([3, 3], [2, 4]) if size == 0 else ([3, 2, 3], [2, 4, 1])
    return {"a": m.unit(sum(of_a), DIM), "b": m.unit(sum(of_b), DIM), "cu_a": offsets(of_a), "cu_b": offsets(of_b)}


def scaled_sets(m: Make, size: int) -> Inputs:
    return sets(m, size) | {"scale": torch.tensor(2.0)}


def maxsim(_: Any, x: Inputs) -> Any:
    return fx.maxsim(x["a"], x["b"], x["cu_a"], x["cu_b"], direction="both")


def late_interaction(_: Any, x: Inputs) -> Any:
    return fx.late_interaction_loss(x["a"], x["b"], x["cu_a"], x["cu_b"], x["scale"])


def corpus(m: Make, size: int) -> Inputs:
    return {"queries": m.rows(4 + size, DIM), "corpus": m.rows(7 + 2 * size, DIM)}


def small_corpus(m: Make, size: int) -> Inputs:
    """int8 rows with a scale, fewer than are asked for."""
    rows = (m.rows(2 + size, DIM) * 40).round().clamp(-127, 127).to(torch.int8)
    return {"queries": m.rows(4 + size, DIM), "corpus": rows, "corpus_scale": m.positive(2 + size) / 40}


def quantized(_: Any, x: Inputs) -> Any:
    scores, rows = fx.topk_similarity(x["queries"], x["corpus"], 5, corpus_scale=x["corpus_scale"])
    return scores.clamp(min=-500), rows  # a missing row scores -inf, which no cotangent may meet


def topk(metric: str) -> Callable[[Any, Inputs], Any]:
    return lambda _, x: fx.topk_similarity(x["queries"], x["corpus"], 3, metric=metric)


def recall(_: Any, x: Inputs) -> Any:
    return torch.tensor(list(fx.recall_at_k(x["a"], x["b"], (1, 3)).values()), dtype=torch.float64, device="cpu")


# Pruning -----------------------------------------------------------------------------------------------------------


def tokens(m: Make, size: int) -> Inputs:
    _, of = lengths(size)
    return {"x": m.rows(sum(of), DIM), "scores": m.rows(sum(of)), "cu": offsets(of)}


def select(_: Any, x: Inputs) -> Any:
    kept = fx.select_tokens(x["scores"], x["cu"], fx.Budget.count(3))
    return kept.keep_index, kept.cu_seqlens, kept.assignment


def prune_tokens(_: Any, x: Inputs) -> Any:
    rows, kept = fx.prune_tokens(x["x"], x["scores"], x["cu"], fx.Budget.ratio(0.5))
    return rows, kept.cu_seqlens


def selection(_: Any, x: Inputs) -> Any:
    kept = fx.select_tokens(x["scores"], x["cu"], fx.Budget.count(3))
    kept = kept.merged(kept.assignment, torch.ones_like(x["scores"]))
    return kept.reduce(x["x"]), kept.cu_seqlens, kept.scatter_back(kept.gather(x["x"]), x["x"])


def indexed(m: Make, size: int) -> Inputs:
    n = 7 + size
    return {"x": m.rows(n, DIM), "coefficient": m.positive(n), "index": torch.randint(-1, 5, (n,), generator=m.g).int()}


def gather(_: Any, x: Inputs) -> Any:
    return gather_rows(x["x"], x["index"], x["coefficient"])


def merge(_: Any, x: Inputs) -> Any:
    return merge_rows(x["x"], x["index"], x["coefficient"], 5)


def unpack(_: Any, x: Inputs) -> Any:
    padded, there = PackedTokens(x["x"], x["cu"], 8).to_padded(length=8)
    return PackedTokens.from_padded(padded).values, there


FUNCTIONS = [
    Row(
        "varlen_cross_attention",
        ("varlen_cross_attention",),
        packed,
        attention,
        same=(("query", "key", "value"), ("cu_q", "cu_k")),
    ),
    Row(
        "varlen_cross_attention, options",
        ("varlen_cross_attention",),
        packed_options,
        attention_options,
        same=(("key", "value"),),
    ),
    Row("cross_attention, masks, bias", ("cross_attention",), padded, cross_attention, same=(("key", "value"),)),
    Row(
        "co_attention",
        ("co_attention",),
        both_sides,
        co_attention,
        same=(("query_a", "value_a"), ("query_b", "value_b")),
    ),
    Row("absorbed_attention", ("absorbed_attention",), features, absorbed_attention),
    Row("key_importance", ("key_importance",), scored, importance, same=(("query", "key"), ("cu_q", "cu_k"))),
    Row("ranges", ("ranges",), builders, all_ranges, derivative=False),
    Row("infonce_loss", ("infonce_loss",), scaled, infonce, same=(LOSS,)),
    Row("infonce_loss, options", ("infonce_loss",), negatives, infonce_options, same=(LOSS,)),
    Row(
        "distillation_loss",
        ("distillation_loss",),
        taught,
        distillation,
        same=(LOSS,),
        constant=("teacher_a", "teacher_b"),
    ),
    Row("multi_positive_infonce_loss", ("multi_positive_infonce_loss",), grouped, multi_positive, same=(LOSS,)),
    Row("infonce_loss, targets, metrics", ("infonce_loss",), targeted, infonce_metrics, same=(LOSS,)),
    Row("sigmoid_loss", ("sigmoid_loss",), pairs, sigmoid("mean"), same=(LOSS,)),
    Row("sigmoid_loss, none", ("sigmoid_loss",), pairs, sigmoid("none"), same=(LOSS,)),
    Row("sigmoid_loss, weights", ("sigmoid_loss",), weighted, sigmoid("mean", True), same=(LOSS,)),
    Row("maxsim", ("maxsim",), sets, maxsim, same=(LOSS, ("cu_a", "cu_b"))),
    Row(
        "late_interaction_loss",
        ("late_interaction_loss",),
        scaled_sets,
        late_interaction,
        same=(LOSS, ("cu_a", "cu_b")),
    ),
    Row("topk_similarity", ("topk_similarity",), corpus, topk("inner")),
    Row("topk_similarity, cosine", ("topk_similarity",), corpus, topk("cosine")),
    Row("topk_similarity, int8", ("topk_similarity",), small_corpus, quantized),
    Row("recall_at_k", ("recall_at_k",), only("a", "b", of=scaled), recall, derivative=False, same=(LOSS,)),
    Row(
        "select_tokens",
        ("select_tokens", "Budget"),
        only("scores", "cu", of=tokens),
        select,
        derivative=False,
        ragged=(0, 1),
    ),
    Row("prune_tokens", ("prune_tokens",), tokens, prune_tokens, constant=("scores",), ragged=(0, 1)),
    Row("gather_rows", (), indexed, gather),
    Row("merge_rows", (), indexed, merge),
    Row("Selection", ("Selection",), tokens, selection, constant=("scores",), ragged=(0, 1)),
    Row("PackedTokens", ("PackedTokens",), only("x", "cu", of=tokens), unpack),
]
