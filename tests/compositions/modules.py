"""Rows of the modules, packed and padded with masks where they take either."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastxattn as fx
from fastxattn import PackedTokens
from fastxattn import nn as fnn
from fastxattn.nn.qformer import encode
from fastxattn.testing import offsets
from tests.compositions.functions import pairs, scaled, scaled_sets
from tests.compositions.row import DIM, HEADS, LOSS, WIDTH, Inputs, Make, Row, lengths, mask, only


def two(of_packed: bool, width_q: int = WIDTH, width_k: int = WIDTH) -> Callable[[Make, int], Inputs]:
    """Two token sets, packed or padded with masks."""

    def make(m: Make, size: int) -> Inputs:
        of_q, of_k = lengths(size)
        if of_packed:
            return {
                "query": m.rows(sum(of_q), width_q),
                "context": m.rows(sum(of_k), width_k),
                "cu_q": offsets(of_q),
                "cu_k": offsets(of_k),
            }
        return {
            "query": m.rows(len(of_q), max(of_q), width_q),
            "context": m.rows(len(of_k), max(of_k), width_k),
            "query_mask": mask(of_q),
            "context_mask": mask(of_k),
        }

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
        times = (torch.arange(x["context"].shape[-2]) * 0.1).expand(x["context"].shape[:-1])
        return x | {"query_times": m.rows(*x["query"].shape[:-1]), "context_times": times.contiguous()}

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
    out = module(x["query"], context(x), context_mask=x.get("context_mask"), text=text, text_mask=x.get("query_mask"))
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
    return module({"contrast": x["a"].square().mean(), "match": (x["a"] * x["b"]).mean()})


def open_gates(block: nn.Module) -> nn.Module:
    """A gated block whose gates are open."""
    with torch.no_grad():
        block.alpha_cross_attn.add_(0.5)
        block.alpha_dense.add_(0.5)
    return block


def media(_: Any, x: Inputs) -> Any:
    return fx.ranges.media_kv_range(x["media"], None, 3)


def times(_: Any, x: Inputs) -> Any:
    q, k = PackedTokens(x["query"], x["cu_q"], 8), PackedTokens(x["context"], x["cu_k"], 8)
    return fx.ranges.timestamp_kv_range(x["query_times"], x["context_times"], q.cu_seqlens, k.cu_seqlens, 0.5, 0.5)


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
            Row(
                f"CoAttention, {form}",
                ("CoAttention",),
                two(of_packed, WIDTH, DIM),
                over("image", "text"),
                functools.partial(fnn.CoAttention, WIDTH, DIM, WIDTH, HEADS),
            ),
            Row(
                f"SharedCrossAttention, {form}",
                ("SharedCrossAttention",),
                sides,
                over("text", "image"),
                functools.partial(fnn.SharedCrossAttention, WIDTH, HEADS),
            ),
            Row(
                f"GatedCrossAttentionBlock, {form}",
                ("GatedCrossAttentionBlock",),
                sides,
                over("hidden"),
                lambda: open_gates(fnn.GatedCrossAttentionBlock(WIDTH, HEADS, 24)),
            ),
            Row(
                f"TemporalCrossAttention, {form}",
                ("TemporalCrossAttention",),
                timed(of_packed),
                temporal,
                functools.partial(fnn.TemporalCrossAttention, WIDTH, HEADS, 0.5),
                constant=("query_times", "context_times"),
            ),
            Row(
                f"PerceiverResampler, {form}",
                ("PerceiverResampler",),
                side,
                pool,
                functools.partial(fnn.PerceiverResampler, WIDTH, 1, HEADS, DIM, 3),
            ),
            Row(
                f"AttentionalPooler, {form}",
                ("AttentionalPooler",),
                side,
                pool,
                functools.partial(fnn.AttentionalPooler, WIDTH, WIDTH, HEADS, queries=3),
            ),
            Row(
                f"SiglipPooler, {form}",
                ("SiglipPooler",),
                side,
                pool,
                functools.partial(fnn.SiglipPooler, WIDTH, HEADS, 24),
            ),
            Row(
                f"QFormer, {form}",
                ("QFormer",),
                former(of_packed),
                qformer,
                functools.partial(fnn.QFormer, WIDTH, 2, HEADS, 24, WIDTH, text=True),
            ),
            Row(
                f"TokenPruner, {form.split(',')[0]}",
                ("TokenPruner",),
                scalar_tokens(of_packed),
                pruned,
                functools.partial(fnn.TokenPruner, 0.5, learned=True, width=DIM),
                ragged=(0, 1),
            ),
        ]
    return rows


MODULES = [
    *_modules(),
    Row(
        "MultiheadCrossAttention, value",
        ("MultiheadCrossAttention",),
        three,
        self_attention,
        functools.partial(fnn.MultiheadCrossAttention, WIDTH, HEADS),
        same=(("query", "context", "value"),),
    ),
    Row(
        "QFormerLayer",
        ("QFormerLayer",),
        learned_queries,
        qformer_layer,
        functools.partial(fnn.QFormerLayer, WIDTH, HEADS, 24, WIDTH),
    ),
    Row(
        "ModalityGate",
        ("ModalityGate",),
        modalities,
        lambda m, x: m([x["a"], x["b"]], x["present"]),
        functools.partial(fnn.ModalityGate, 2, WIDTH),
        same=(LOSS,),
    ),
    Row(
        "VisualProjector",
        ("VisualProjector",),
        grid_tokens,
        grids,
        functools.partial(fnn.VisualProjector, DIM, WIDTH, shuffle=2),
    ),
    Row("pixel_shuffle", ("pixel_shuffle",), grid_tokens, shuffle),
    Row("media_kv_range, padded", ("ranges",), lambda m, n: {"media": m.rows(2, 5 + n) > 0}, media, derivative=False),
    Row("timestamp_kv_range, packed tokens", ("ranges",), timed(True), times, derivative=False),
    Row(
        "InfoNCELoss",
        ("InfoNCELoss",),
        scaled,
        lambda m, x: m(x["a"], x["b"], x["scale"]),
        fnn.InfoNCELoss,
        same=(LOSS,),
    ),
    Row(
        "SigmoidLoss",
        ("SigmoidLoss",),
        pairs,
        lambda m, x: m(x["a"], x["b"], x["scale"], x["bias"]),
        fnn.SigmoidLoss,
        same=(LOSS,),
    ),
    Row(
        "FILIPLoss",
        ("FILIPLoss",),
        scaled_sets,
        lambda m, x: m(x["a"], x["b"], x["cu_a"], x["cu_b"], x["scale"]),
        fnn.FILIPLoss,
        same=(LOSS, ("cu_a", "cu_b")),
    ),
    Row(
        "BLIP2ITCLoss",
        ("BLIP2ITCLoss",),
        query_tokens,
        lambda m, x: m(x["image"], x["text"], x["scale"]),
        fnn.BLIP2ITCLoss,
    ),
    Row(
        "MultiTaskLoss",
        ("MultiTaskLoss",),
        only("a", "b", of=modalities),
        tasks,
        functools.partial(fnn.MultiTaskLoss, {"contrast": 1.0, "match": 0.5}),
        same=(LOSS,),
    ),
]
