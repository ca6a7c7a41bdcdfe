"""A correct random problem for every operator of the library, which :mod:`fuzz_library` then breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

Feeds = dict[str, np.ndarray]
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


@dataclass(frozen=True)
class Operator:
    """What a model needs to know to hold one node of it."""

    name: str
    inputs: tuple[str, ...]
    outputs: dict[str, int | None]
    """Element types; None: that of the first input."""
    attributes: tuple[str, ...]
    sound: Callable[[np.random.Generator], Feeds]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def _some(random: np.random.Generator, optional: Feeds) -> Feeds:
    return {name: x for name, x in optional.items() if random.random() < 0.4}


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def _slots(random: np.random.Generator, lengths_q: np.ndarray, lengths_k: np.ndarray) -> Feeds:
    rows_q, rows_k = int(lengths_q.sum()), int(lengths_k.sum())
    query_index, keys = random.permutation(rows_q), np.repeat(lengths_k, lengths_q)
    # A range lies within the sequence of its row, with the index and without.
    most = keys.copy()
    most[query_index] = np.minimum(most[query_index], keys)
    return {
        "seqused_q": lengths_q.astype(np.int32),
        "seqused_k": lengths_k.astype(np.int32),
        "query_index": query_index.astype(np.int32),
        "key_index": random.permutation(rows_k).astype(np.int32),
        "kv_range": np.sort(random.integers(0, most[:, None] + 1, (rows_q, 2))).astype(np.int32),
    }


def _lengths(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Feeds]:
    lengths_q, lengths_k = random.integers(0, 4, 3), random.integers(0, 5, 3)
    return lengths_q, lengths_k, {"cu_seqlens_q": _offsets(lengths_q), "cu_seqlens_k": _offsets(lengths_k)}


def _attention(random: np.random.Generator) -> Feeds:
    lengths_q, lengths_k, offsets = _lengths(random)
    rows_q, rows_k = int(lengths_q.sum()), int(lengths_k.sum())
    feeds = {"query": _normal(random, rows_q, 4, 8), "key": _normal(random, rows_k, 2, 8)}
    feeds |= {"value": _normal(random, rows_k, 2, 6)} | offsets
    optional = _slots(random, lengths_q, lengths_k) | {"key_bias": _normal(random, rows_k)}
    # Places in a permuted sequence are not below its length: the bias belongs to the plain order.
    if random.random() < 0.3:
        optional = {"bias": _normal(random, 3, 1, 4, 5)}
    return feeds | _some(random, optional)


def _importance(random: np.random.Generator) -> Feeds:
    lengths_q, lengths_k, offsets = _lengths(random)
    rows_q, rows_k = int(lengths_q.sum()), int(lengths_k.sum())
    feeds = {"query": _normal(random, rows_q, 4, 8), "key": _normal(random, rows_k, 2, 8)}
    feeds |= {"lse": _normal(random, 4, rows_q)} | offsets
    optional = _slots(random, lengths_q, lengths_k)
    optional |= {"key_bias": _normal(random, rows_k, 4), "row_weight": _normal(random, rows_q)}
    return feeds | _some(random, optional)


def _context(random: np.random.Generator) -> Feeds:
    lengths_q, lengths_k, offsets = _lengths(random)
    rows_q, rows_k = int(lengths_q.sum()), int(lengths_k.sum())
    optional = {
        "kv_range": random.integers(-3, 7, (rows_q, 2)).astype(np.int32),
        "key_bias": _normal(random, rows_k),
    }
    feeds = {"query": _normal(random, rows_q, 3, 16), "context": _normal(random, rows_k, 16)} | offsets
    return feeds | _some(random, optional)


def _select(random: np.random.Generator) -> Feeds:
    lengths = random.integers(0, 6, 3)
    total = int(lengths.sum())
    return {
        "scores": _normal(random, total),
        "cu_seqlens": _offsets(lengths),
        "counts": random.integers(0, 4, 3).astype(np.int32),
        "capacity": np.array([random.integers(0, 9)], np.int64),
    } | _some(random, {"protected": random.random(total) < 0.3})


_SLOTS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "query_index", "key_index", "kv_range", "key_bias")
OPERATORS = (
    Operator(
        "Attention",
        ("query", "key", "value", *_SLOTS, "bias"),
        {"out": None, "lse": FLOAT},
        ("scale", "softcap"),
        _attention,
    ),
    Operator(
        "KeyImportance",
        ("query", "key", "lse", *_SLOTS, "row_weight"),
        {"score": FLOAT},
        ("scale", "softcap"),
        _importance,
    ),
    Operator(
        "AbsorbedAttention",
        ("query", "context", "cu_seqlens_q", "cu_seqlens_k", "kv_range", "key_bias"),
        {"out": None, "lse": FLOAT},
        ("scale",),
        _context,
    ),
    Operator(
        "Select",
        ("scores", "cu_seqlens", "counts", "capacity", "protected"),
        {"keep_index": INT32, "cu_keep": INT32, "assignment": INT32},
        (),
        _select,
    ),
)
