"""The rows of the composition table: one small problem of every public operation and of every module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastxattn as fx
from fastxattn import PackedTokens
from fastxattn import nn as fnn
from fastxattn.nn import QFormerLayer
from fastxattn.nn.qformer import encode
from fastxattn.ops.pruning import gather_rows, merge_rows
from fastxattn.testing import offsets

Inputs = dict[str, Tensor]
HEADS, DIM, WIDTH = 2, 8, 16


@dataclass(frozen=True)
class Row:
    """One problem. ``call(module, inputs)`` gives a tensor or a tuple; ``module`` is None for functions."""

    name: str
    covers: tuple[str, ...]
    """Public names that this row stands for."""
    inputs: Callable[[Any, int], Inputs]
    """Of a :class:`Make` and a size, 0 or 1: floating point inputs are differentiable, integers and masks are not."""
    call: Callable[[Any, Inputs], Any]
    build: Callable[[], nn.Module] | None = None
    derivative: bool = True
    """False: indices, masks and metrics, which have none."""
    same: tuple[tuple[str, ...], ...] = ()
    """Groups of inputs that may be one tensor."""
    ragged: tuple[int, int] | None = None
    """Results (i, j) of which i has as many rows as offsets j say; a traced call may give more, which nothing reads."""
    constant: tuple[str, ...] = ()
    """Floating point inputs without a gradient: teachers, scores that rank."""
    inductor: bool = False
    """Compiled by inductor too, which takes long."""


class Make:
    """Random inputs of a row."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def rows(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.g)

    def unit(self, *shape: int) -> Tensor:
        """Rows of length 1."""
        return nn.functional.normalize(self.rows(*shape), dim=-1)

    def positive(self, *shape: int) -> Tensor:
        """Weights."""
        return torch.rand(*shape, generator=self.g) + 0.1


def only(*names: str, of: Callable[[Make, int], Inputs]) -> Callable[[Make, int], Inputs]:
    """These inputs of a larger problem."""
    return lambda m, size: {name: t for name, t in of(m, size).items() if name in names}


def lengths(size: int) -> tuple[list[int], list[int]]:
    """Of the queries' and of the keys' sequences: the same number, and the larger problem has one more."""
    return ([4, 5], [5, 7]) if size == 0 else ([4, 5, 2], [6, 0, 8])


def mask(of: list[int]) -> Tensor:
    """(batch, longest) boolean."""
    return torch.arange(max(of)) < torch.tensor(of)[:, None]


def ranges(of_q: list[int], of_k: list[int]) -> Tensor:
    """Each query sees all but the last key of its sequence."""
    return torch.tensor([[0, max(k - 1, 0)] for q, k in zip(of_q, of_k, strict=True) for _ in range(q)]).int()


# Attention ---------------------------------------------------------------------------------------------------------


def packed(m: Make, size: int) -> Inputs:
    """Query, key and value with their offsets."""
    of_q, of_k = lengths(size)
    return {
        "query": m.rows(sum(of_q), HEADS, DIM), "key": m.rows(sum(of_k), HEADS, DIM),
        "value": m.rows(sum(of_k), HEADS, DIM), "cu_q": offsets(of_q), "cu_k": offsets(of_k),
    }  # fmt: skip


def packed_options(m: Make, size: int) -> Inputs:
    """With a range, a bias and rows picked by an index."""
    of_q, of_k = lengths(size)
    order = torch.randperm(sum(of_k), generator=m.g).int()
    return packed(m, size) | {"key_bias": m.rows(sum(of_k)), "kv_range": ranges(of_q, of_k), "key_index": order}


def attention(_: Any, x: Inputs) -> Any:
    return fx.varlen_cross_attention(x["query"], x["key"], x["value"], x["cu_q"], x["cu_k"])


def attention_options(_: Any, x: Inputs) -> Any:
    out, lse = fx.varlen_cross_attention(
        x["query"], x["key"], x["value"], x["cu_q"], x["cu_k"], scale=0.4, softcap=3.0, kv_range=x["kv_range"],
        key_bias=x["key_bias"], key_index=x["key_index"], dropout_p=0.2, dropout_seed=7, return_lse=True,
    )  # fmt: skip
    return out, lse.clamp(min=-50)  # a query that sees no key has -inf, which no cotangent may meet


def padded(m: Make, size: int) -> Inputs:
    """Two padded sides with masks and a bias."""
    of_q, of_k = lengths(size)
    b, lq, lk = len(of_q), max(of_q), max(of_k)
    return {
        "query": m.rows(b, lq, HEADS, DIM), "key": m.rows(b, lk, HEADS, DIM), "value": m.rows(b, lk, HEADS, DIM),
        "bias": m.rows(1, HEADS, lq, lk), "query_mask": mask(of_q), "key_mask": mask(of_k),
    }  # fmt: skip


def cross_attention(_: Any, x: Inputs) -> Any:
    return fx.cross_attention(
        x["query"], x["key"], x["value"], query_mask=x["query_mask"], key_mask=x["key_mask"], bias=x["bias"]
    )


def both_sides(m: Make, size: int) -> Inputs:
    """Co-attention."""
    of_a, of_b = lengths(size)
    a, b = sum(of_a), sum(of_b)
    return {
        "query_a": m.rows(a, HEADS, DIM), "query_b": m.rows(b, HEADS, DIM), "value_a": m.rows(a, HEADS, DIM),
        "value_b": m.rows(b, HEADS, DIM), "bias_b": m.rows(b), "cu_a": offsets(of_a), "cu_b": offsets(of_b),
    }  # fmt: skip


def bidirectional(_: Any, x: Inputs) -> Any:
    return fx.bidirectional_attention(
        x["query_a"], x["query_b"], x["value_a"], x["value_b"], x["cu_a"], x["cu_b"], bias_b=x["bias_b"]
    )


def features(m: Make, size: int) -> Inputs:
    """Absorbed attention."""
    of_q, of_k = lengths(size)
    return {
        "query": m.rows(sum(of_q), HEADS, DIM), "context": m.rows(sum(of_k), DIM), "key_bias": m.rows(sum(of_k)),
        "cu_q": offsets(of_q), "cu_k": offsets(of_k),
    }  # fmt: skip


def context_attention(_: Any, x: Inputs) -> Any:
    out, lse = fx.context_attention(
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
        "cu_q": offsets(of_q), "cu_k": offsets(of_k), "query_times": m.rows(sum(of_q)),
        "key_times": torch.cat(times), "media": m.rows(sum(of_q)) > 0,
    }  # fmt: skip


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
        "hard": m.unit(n, 2, DIM), "queue_a": m.unit(5, DIM), "queue_b": m.unit(4, DIM), "weights": m.positive(n),
        "ids": torch.arange(n) // 2,
    }  # fmt: skip


def taught(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    n = x["a"].shape[0]
    return x | {"teacher_a": m.unit(n, 4), "teacher_b": m.unit(n, 4)}


def targeted(m: Make, size: int) -> Inputs:
    x = scaled(m, size)
    return x | {"targets": torch.arange(x["a"].shape[0]).flip(0)}


def infonce(_: Any, x: Inputs) -> Any:
    return fx.infonce_loss(x["a"], x["b"], x["scale"])


def infonce_options(_: Any, x: Inputs) -> Any:
    return fx.infonce_loss(
        x["a"], x["b"], x["scale"], hard_negatives=x["hard"], queue_a=x["queue_a"], queue_b=x["queue_b"],
        ignore_ids=x["ids"], weights=x["weights"], label_smoothing=0.1, normalize=True,
    )  # fmt: skip


def infonce_teacher(_: Any, x: Inputs) -> Any:
    return fx.infonce_loss(x["a"], x["b"], x["scale"], teacher=(x["teacher_a"], x["teacher_b"], 2.0))


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
    return {"queries": m.rows(4 + size, DIM), "corpus": rows, "corpus_scale": m.positive(2 + size)}


def quantized(_: Any, x: Inputs) -> Any:
    scores, rows = fx.topk_similarity(x["queries"], x["corpus"], 5, corpus_scale=x["corpus_scale"])
    return scores.clamp(min=-500), rows  # a missing row scores -inf, which no cotangent may meet


def topk(metric: str) -> Callable[[Any, Inputs], Any]:
    return lambda _, x: fx.topk_similarity(x["queries"], x["corpus"], 3, metric=metric)


def recall(_: Any, x: Inputs) -> Any:
    return torch.tensor(list(fx.recall_at_k(x["a"], x["b"], (1, 3)).values()))


# Pruning -----------------------------------------------------------------------------------------------------------


def tokens(m: Make, size: int) -> Inputs:
    _, of = lengths(size)
    return {"x": m.rows(sum(of), DIM), "scores": m.rows(sum(of)), "cu": offsets(of)}


def select(_: Any, x: Inputs) -> Any:
    kept = fx.select(x["scores"], x["cu"], fx.Budget.count(3))
    return kept.keep_index, kept.cu_seqlens, kept.assignment


def prune_tokens(_: Any, x: Inputs) -> Any:
    rows, kept = fx.prune_tokens(x["x"], x["scores"], x["cu"], fx.Budget.ratio(0.5))
    return rows, kept.cu_seqlens


def selection(_: Any, x: Inputs) -> Any:
    kept = fx.select(x["scores"], x["cu"], fx.Budget.count(3))
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


# Modules -----------------------------------------------------------------------------------------------------------


def two(of_packed: bool, width_q: int = WIDTH, width_k: int = WIDTH) -> Callable[[Make, int], Inputs]:
    """Two token sets, packed or padded with masks."""

    def make(m: Make, size: int) -> Inputs:
        of_q, of_k = lengths(size)
        if of_packed:
            return {
                "query": m.rows(sum(of_q), width_q), "context": m.rows(sum(of_k), width_k), "cu_q": offsets(of_q),
                "cu_k": offsets(of_k),
            }  # fmt: skip
        return {
            "query": m.rows(len(of_q), max(of_q), width_q), "context": m.rows(len(of_k), max(of_k), width_k),
            "query_mask": mask(of_q), "context_mask": mask(of_k),
        }  # fmt: skip

    return make


def one(of_packed: bool, width: int = WIDTH) -> Callable[[Make, int], Inputs]:
    """The context alone."""

    def make(m: Make, size: int) -> Inputs:
        return {name: t for name, t in two(of_packed, width, width)(m, size).items() if name[:5] in ("conte", "cu_k")}

    return make


def query(x: Inputs) -> Any:
    """Queries as a module takes them."""
    return PackedTokens(x["query"], x["cu_q"], 8) if "cu_q" in x else x["query"]


def context(x: Inputs) -> Any:
    return PackedTokens(x["context"], x["cu_k"], 8) if "cu_k" in x else x["context"]


def plain(out: Any) -> Any:
    """Tensors of what a module returns."""
    if isinstance(out, (tuple, list)):
        return tuple(plain(o) for o in out)
    return out.values if isinstance(out, PackedTokens) else out


def over(first: str, second: str = "context") -> Callable[[Any, Inputs], Any]:
    """``module(queries, context)`` with masks of these names where the tokens are padded."""

    def call(module: Any, x: Inputs) -> Any:
        masks = {f"{first}_mask": x["query_mask"], f"{second}_mask": x["context_mask"]} if "query_mask" in x else {}
        return plain(module(query(x), context(x), **masks))

    return call


def pool(module: Any, x: Inputs) -> Any:
    return module(context(x), context_mask=x.get("context_mask"))


def timed(of_packed: bool) -> Callable[[Make, int], Inputs]:
    def make(m: Make, size: int) -> Inputs:
        x = two(of_packed)(m, size)
        return x | {
            "query_times": m.rows(*x["query"].shape[:-1]).sort().values if not of_packed else m.rows(x["query"].shape[0]),
            "context_times": (torch.arange(x["context"].shape[-2]) * 0.1).expand(x["context"].shape[:-1]).contiguous(),
        }  # fmt: skip

    return make


def temporal(module: Any, x: Inputs) -> Any:
    masks = {"query_mask": x["query_mask"], "context_mask": x["context_mask"]} if "query_mask" in x else {}
    return plain(module(query(x), context(x), x["query_times"], x["context_times"], **masks))


def projected(module: Any, x: Inputs) -> Any:
    kv = module.precompute_kv(context(x), context_mask=x.get("context_mask"))
    return plain(module(query(x), query_mask=x.get("query_mask"), context_kv=kv))


def self_attention(module: Any, x: Inputs) -> Any:
    return module(x["query"], x["context"], x["value"])


def three(m: Make, size: int) -> Inputs:
    return {name: m.rows(2, 5 + size, WIDTH) for name in ("query", "context", "value")}


def former(of_packed: bool) -> Callable[[Make, int], Inputs]:
    def make(m: Make, size: int) -> Inputs:
        x = two(of_packed)(m, size)
        x["text"] = x.pop("query")
        return x | {"query": m.rows(1, 3, WIDTH)}

    return make


def qformer(module: Any, x: Inputs) -> Any:
    text = PackedTokens(x["text"], x["cu_q"], 8) if "cu_q" in x else x["text"]
    out = module(
        x["query"], context(x), context_mask=x.get("context_mask"), text=text, text_mask=x.get("query_mask")
    )  # fmt: skip
    return plain(out)


def qformer_layer(module: Any, x: Inputs) -> Any:
    return encode([module], x["query"].expand(x["cu_k"].shape[0] - 1, -1, -1), None, context(x))[0]


def learned_queries(m: Make, size: int) -> Inputs:
    return {"query": m.rows(1, 3, WIDTH)} | one(True)(m, size)


def modalities(m: Make, size: int) -> Inputs:
    n = 4 + size
    return {"a": m.rows(n, WIDTH), "b": m.rows(n, WIDTH), "present": m.rows(n, 2) > -0.5}


def grids(module: Any, x: Inputs) -> Any:
    shape = [(2, 4), (2, 2)]
    return plain(module(PackedTokens(x["x"], x["cu"], 8), grids=shape))


def grid_tokens(m: Make, size: int) -> Inputs:
    return {"x": m.rows(12, DIM), "cu": offsets([8, 4])}


def shuffle(_: Any, x: Inputs) -> Any:
    return fnn.pixel_shuffle(PackedTokens(x["x"], x["cu"], 8), [(2, 4), (2, 2)], 2).values


def pruned(module: Any, x: Inputs) -> Any:
    fewer, kept = module(PackedTokens(x["x"], x["cu"], 8) if "cu" in x else x["x"])
    return fewer.values, fewer.cu_seqlens, kept.assignment


def scalar_tokens(of_packed: bool) -> Callable[[Make, int], Inputs]:
    def make(m: Make, size: int) -> Inputs:
        _, of = lengths(size)
        return {"x": m.rows(sum(of), DIM), "cu": offsets(of)} if of_packed else {"x": m.rows(2 + size, 5, DIM)}

    return make


def query_tokens(m: Make, size: int) -> Inputs:
    n = 3 + size
    return {"image": m.unit(n, 4, DIM), "text": m.unit(n, DIM), "scale": torch.tensor(2.0)}


def tasks(module: Any, x: Inputs) -> Any:
    return module({"contrast": x["a"].square().sum(), "match": (x["a"] * x["b"]).sum()})


def open_gates(block: nn.Module) -> nn.Module:
    """A gated block whose gates are open."""
    with torch.no_grad():
        block.alpha_cross_attn.add_(0.5)
        block.alpha_dense.add_(0.5)
    return block


def media(_: Any, x: Inputs) -> Any:
    return fnn.media_ranges(x["media"], 3)


def times(_: Any, x: Inputs) -> Any:
    q, k = PackedTokens(x["query"], x["cu_q"], 8), PackedTokens(x["context"], x["cu_k"], 8)
    return fnn.time_ranges(x["query_times"], q, x["context_times"], k, 0.5, 0.5)


def _modules() -> list[Row]:
    """Every module, packed and padded with masks where it takes either."""
    rows = []
    for form, of_packed in (("packed", True), ("padded, masks", False)):
        sides, side = two(of_packed), one(of_packed)
        for name, absorb in (("MultiheadCrossAttention", "off"), ("MultiheadCrossAttention, absorbed", "on")):
            build = functools.partial(fnn.MultiheadCrossAttention, WIDTH, HEADS, absorb=absorb)
            rows.append(Row(f"{name}, {form}", ("MultiheadCrossAttention",), sides, over("query"), build))
        make = functools.partial(fnn.MultiheadCrossAttention, WIDTH, HEADS)
        rows += [
            Row(f"ContextKV, {form}", ("ContextKV",), sides, projected, make),
            Row(f"BidirectionalCrossAttention, {form}", ("BidirectionalCrossAttention",), two(of_packed, WIDTH, DIM),
                over("image", "text"), functools.partial(fnn.BidirectionalCrossAttention, WIDTH, DIM, WIDTH, HEADS)),
            Row(f"SharedCrossAttention, {form}", ("SharedCrossAttention",), sides, over("text", "image"),
                functools.partial(fnn.SharedCrossAttention, WIDTH, HEADS)),
            Row(f"GatedCrossAttentionBlock, {form}", ("GatedCrossAttentionBlock",), sides, over("hidden"),
                lambda: open_gates(fnn.GatedCrossAttentionBlock(WIDTH, HEADS, 24))),
            Row(f"TemporalCrossAttention, {form}", ("TemporalCrossAttention",), timed(of_packed), temporal,
                functools.partial(fnn.TemporalCrossAttention, WIDTH, HEADS, 0.5),
                constant=("query_times", "context_times")),
            Row(f"PerceiverResampler, {form}", ("PerceiverResampler",), side, pool,
                functools.partial(fnn.PerceiverResampler, WIDTH, 1, HEADS, DIM, 3)),
            Row(f"AttentionalPooler, {form}", ("AttentionalPooler",), side, pool,
                functools.partial(fnn.AttentionalPooler, WIDTH, WIDTH, HEADS, queries=3)),
            Row(f"SiglipPooler, {form}", ("SiglipPooler",), side, pool,
                functools.partial(fnn.SiglipPooler, WIDTH, HEADS, 24)),
            Row(f"QFormer, {form}", ("QFormer",), former(of_packed), qformer,
                functools.partial(fnn.QFormer, WIDTH, 2, HEADS, 24, WIDTH, text=True)),
            Row(f"TokenPruner, {form.split(',')[0]}", ("TokenPruner",), scalar_tokens(of_packed), pruned,
                functools.partial(fnn.TokenPruner, 0.5, learned=True, width=DIM), ragged=(0, 1)),
        ]  # fmt: skip
    return rows


LOSS = ("a", "b")
ROWS = [
    Row("varlen_cross_attention", ("varlen_cross_attention",), packed, attention,
        same=(("query", "key", "value"), ("cu_q", "cu_k")), inductor=True),
    Row("varlen_cross_attention, options", ("varlen_cross_attention",), packed_options, attention_options,
        same=(("key", "value"),)),
    Row("cross_attention, masks, bias", ("cross_attention",), padded, cross_attention, same=(("key", "value"),)),
    Row("bidirectional_attention", ("bidirectional_attention",), both_sides, bidirectional,
        same=(("query_a", "value_a"), ("query_b", "value_b"))),
    Row("context_attention", ("context_attention",), features, context_attention),
    Row("key_importance", ("key_importance",), scored, importance, same=(("query", "key"), ("cu_q", "cu_k"))),
    Row("ranges", ("ranges",), builders, all_ranges, derivative=False, same=(("cu_q", "cu_k"),)),
    Row("infonce_loss", ("infonce_loss",), scaled, infonce, same=(LOSS,), inductor=True),
    Row("infonce_loss, options", ("infonce_loss",), negatives, infonce_options, same=(LOSS,)),
    Row("infonce_loss, teacher", ("infonce_loss",), taught, infonce_teacher, same=(LOSS,),
        constant=("teacher_a", "teacher_b")),
    Row("infonce_loss, targets, metrics", ("infonce_loss",), targeted, infonce_metrics, same=(LOSS,)),
    Row("sigmoid_loss", ("sigmoid_loss",), pairs, sigmoid("mean"), same=(LOSS,)),
    Row("sigmoid_loss, none", ("sigmoid_loss",), pairs, sigmoid("none"), same=(LOSS,)),
    Row("sigmoid_loss, weights", ("sigmoid_loss",), weighted, sigmoid("mean", True), same=(LOSS,)),
    Row("maxsim", ("maxsim",), sets, maxsim, same=(LOSS, ("cu_a", "cu_b"))),
    Row("late_interaction_loss", ("late_interaction_loss",), scaled_sets, late_interaction,
        same=(LOSS, ("cu_a", "cu_b"))),
    Row("topk_similarity", ("topk_similarity",), corpus, topk("inner")),
    Row("topk_similarity, cosine", ("topk_similarity",), corpus, topk("cosine")),
    Row("topk_similarity, int8", ("topk_similarity",), small_corpus, quantized),
    Row("recall_at_k", ("recall_at_k",), only("a", "b", of=scaled), recall, derivative=False, same=(LOSS,)),
    Row("select", ("select", "Budget"), only("scores", "cu", of=tokens), select, derivative=False, ragged=(0, 1)),
    Row("prune_tokens", ("prune_tokens",), tokens, prune_tokens, constant=("scores",), inductor=True,
        ragged=(0, 1)),
    Row("gather_rows", (), indexed, gather),
    Row("merge_rows", (), indexed, merge),
    Row("Selection", ("Selection",), tokens, selection, constant=("scores",), ragged=(0, 1)),
    Row("PackedTokens", ("PackedTokens",), only("x", "cu", of=tokens), unpack),
    *_modules(),
    Row("MultiheadCrossAttention, value", ("MultiheadCrossAttention",), three, self_attention,
        functools.partial(fnn.MultiheadCrossAttention, WIDTH, HEADS), same=(("query", "context", "value"),),
        inductor=True),
    Row("QFormerLayer", ("QFormerLayer",), learned_queries, qformer_layer,
        functools.partial(QFormerLayer, WIDTH, HEADS, 24, WIDTH)),
    Row("ModalityGate", ("ModalityGate",), modalities, lambda m, x: m([x["a"], x["b"]], x["present"]),
        functools.partial(fnn.ModalityGate, 2, WIDTH), same=(LOSS,)),
    Row("VisualProjector", ("VisualProjector",), grid_tokens, grids,
        functools.partial(fnn.VisualProjector, DIM, WIDTH, shuffle=2)),
    Row("pixel_shuffle", ("pixel_shuffle",), grid_tokens, shuffle),
    Row("media_ranges", ("media_ranges",), lambda m, n: {"media": m.rows(2, 5 + n) > 0}, media, derivative=False),
    Row("time_ranges", ("time_ranges",), timed(True), times, derivative=False),
    Row("InfoNCELoss", ("InfoNCELoss",), scaled, lambda m, x: m(x["a"], x["b"], x["scale"]), fnn.InfoNCELoss,
        same=(LOSS,)),
    Row("SigmoidLoss", ("SigmoidLoss",), pairs, lambda m, x: m(x["a"], x["b"], x["scale"], x["bias"]),
        fnn.SigmoidLoss, same=(LOSS,)),
    Row("FILIPLoss", ("FILIPLoss",), scaled_sets, lambda m, x: m(x["a"], x["b"], x["cu_a"], x["cu_b"], x["scale"]),
        fnn.FILIPLoss, same=(LOSS, ("cu_a", "cu_b"))),
    Row("BLIP2ITCLoss", ("BLIP2ITCLoss",), query_tokens, lambda m, x: m(x["image"], x["text"], x["scale"]),
        fnn.BLIP2ITCLoss),
    Row("MultiTaskLoss", ("MultiTaskLoss",), only("a", "b", of=modalities), tasks,
        functools.partial(fnn.MultiTaskLoss, {"contrast": 1.0, "match": 0.5}), same=(LOSS,)),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
NOT_COMPUTING = {
    "__version__", "accelerate", "accelerated", "explain", "prune", "register_adapter", "restore", "status",
}  # fmt: skip
"""Public names that compute nothing by themselves: they change models, or describe a call."""
