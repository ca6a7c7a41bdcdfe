"""Writing a fastxattn node where :mod:`fastxattn.export.patterns` found attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastxattn.export.patterns import LOWEST, Index, Match


class Writer:
    """Collects the nodes that replace one match; names are unique in the graph."""

    def __init__(self, index: Index, prefix: str) -> None:
        self.index = index
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        self._count = itertools.count()

    def constant(self, value: Any, dtype: type) -> str:
        """A constant tensor."""
        name = f"{self._prefix}_{next(self._count)}"
        self.nodes.append(
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype)))
        )
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self.constant(list(values), np.int64)

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        name = f"{self._prefix}_{next(self._count)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def size(self, name: str, axis: int) -> str:
        """(1,) size of one axis."""
        return self("Shape", name, start=axis, end=axis + 1)


def write(index: Index, match: Match, prefix: str) -> list[onnx.NodeProto]:
    """Nodes that compute ``match.node``'s output with one fastxattn::Attention."""
    w = Writer(index, prefix)
    packed = match.heads is None
    query, shape_q = _rows(w, match.query, match.heads, False)
    key, shape_k = _rows(w, match.key, match.kv_heads, match.key_transposed)
    value, _ = _rows(w, match.value, match.kv_heads, False)
    batch, length_q, heads = shape_q
    length_k = shape_k[1]
    cu_q, cu_k = (_offsets(w, batch, n) for n in (length_q, length_k))
    none = w.constant([], np.int32)
    used, index_k, key_bias, bias = _masks(w, match, batch, length_q, length_k)
    ranges = w.constant(np.zeros((0, 2)), np.int32)
    if match.causal:
        place = _ranges(w, batch, length_q)
        ranges = w(
            "Concat", w("Mul", place, w.constant([0], np.int32)), w("Add", place, w.constant([1], np.int32)), axis=1
        )
    scale = match.scale
    if scale is None:
        width = (index.shape(match.query) or [None])[-1]
        if not isinstance(width, int):
            raise ValueError("the head dimension is not known, and no scale is given")
        scale = float((width if packed else width // (match.heads or 1)) ** -0.5)
    names = [query, key, value, cu_q, cu_k, none, used or none, none, index_k or none, ranges]
    names += [key_bias or w.constant([], np.float32), bias or w.constant(np.zeros((0, 0, 0, 0)), np.float32)]
    out = f"{prefix}_out"
    w.nodes.append(
        helper.make_node(
            "Attention",
            names,
            [out, f"{prefix}_lse"],
            f"{prefix}_attention",
            domain="fastxattn",
            scale=scale,
            softcap=match.softcap,
        )
    )
    value_dim = w.size(out, 2)
    if packed:
        back = w("Reshape", out, w("Concat", batch, length_q, heads, value_dim, axis=0), allowzero=1)
        w("Transpose", back, perm=[0, 2, 1, 3])
    else:
        w("Reshape", out, w("Concat", batch, length_q, w("Mul", heads, value_dim), axis=0), allowzero=1)
    w.nodes[-1].output[0] = match.node.output[0]
    return w.nodes


def _rows(w: Writer, name: str, heads: int | None, transposed: bool) -> tuple[str, tuple[str, str, str]]:
    """A tensor as (rows, heads, dim), and its batch, length and heads."""
    batch = w.size(name, 0)
    if heads is None:
        if transposed:
            name = w("Transpose", name, perm=[0, 1, 3, 2])
        count, length, dim = w.size(name, 1), w.size(name, 2), w.size(name, 3)
        name = w("Transpose", name, perm=[0, 2, 1, 3])
    else:
        count, length = w.ints(heads), w.size(name, 1)
        dim = w("Div", w.size(name, 2), count)
    shape = w("Concat", w("Mul", batch, length), count, dim, axis=0)
    return w("Reshape", name, shape, allowzero=1), (batch, length, count)


def _offsets(w: Writer, batch: str, length: str) -> str:
    """(batch + 1,) int32 multiples of the length."""
    zero, one = w.constant(0, np.int64), w.constant(1, np.int64)
    count = w("Squeeze", w("Add", batch, w.ints(1)))
    return w("Cast", w("Mul", w("Range", zero, count, one), length), to=TensorProto.INT32)


def _ranges(w: Writer, batch: str, length: str) -> str:
    """(batch x length, 1) int32: each query's place in its sequence."""
    zero, one = w.constant(0, np.int64), w.constant(1, np.int64)
    places = w("Range", zero, w("Squeeze", length), one)
    every = w("Expand", w("Unsqueeze", places, w.ints(0)), w("Concat", batch, length, axis=0))
    return w("Cast", w("Reshape", every, w("Concat", w("Mul", batch, length), w.ints(1), axis=0)), to=TensorProto.INT32)


def _masks(
    w: Writer, match: Match, batch: str, length_q: str, length_k: str
) -> tuple[str | None, str | None, str | None, str | None]:
    """seqused_k, key_index, key_bias and bias. What hides whole keys becomes lengths, so that they cost nothing."""
    if match.lengths is not None:
        return w("Cast", match.lengths, to=TensorProto.INT32), None, None, _sum(w, match.biases)
    grid = w("Concat", batch, length_k, axis=0)
    visible: list[str] = []
    key_bias: list[str] = []
    bias: list[str] = []
    if match.key_mask is not None:
        visible.append(w("Cast", match.key_mask, to=TensorProto.BOOL))
    for name in match.biases:
        source = _keys_only(w.index, name)
        if source is None:
            bias.append(w("Cast", name, to=TensorProto.FLOAT))
            continue
        flat = w("Expand", w("Squeeze", w("Cast", source, to=TensorProto.FLOAT), w.ints(1, 2)), grid)
        visible.append(w("Greater", flat, w.constant(LOWEST, np.float32)))
        key_bias.append(w("Reshape", flat, w.ints(-1)))
    for name, sense, hidden in match.masks:
        source = _keys_only(w.index, name) if hidden <= -1e4 else None
        if source is None:
            shown, gone = w.constant(0.0, np.float32), w.constant(hidden, np.float32)
            bias.append(w("Where", name, *((shown, gone) if sense else (gone, shown))))
        else:
            flat = w("Expand", w("Squeeze", source, w.ints(1, 2)), grid)
            visible.append(flat if sense else w("Not", flat))
    total = _sum(w, bias)
    if total is not None and (rank := _rank_of(w.index, match)) < 4:
        total = w("Unsqueeze", total, w.ints(*range(4 - rank)))
    if not visible:
        return None, None, None, total
    seen = visible[0]
    for other in visible[1:]:
        seen = w("And", seen, other)
    number = w("Cast", seen, to=TensorProto.INT32)
    used = w("ReduceSum", number, w.ints(1), keepdims=0)
    # Visible keys first, in their order: TopK keeps the lower of equal places first.
    order = f"{w._prefix}_order"
    w.nodes.append(helper.make_node("TopK", [number, length_k], [f"{order}_values", order], axis=1))
    zero, one = w.constant(0, np.int64), w.constant(1, np.int64)
    first = w("Unsqueeze", w("Mul", w("Range", zero, w("Squeeze", batch), one), length_k), w.ints(1))
    index_k = w("Cast", w("Reshape", w("Add", order, first), w.ints(-1)), to=TensorProto.INT32)
    return used, index_k, _sum(w, key_bias), total


def _sum(w: Writer, names: Sequence[str]) -> str | None:
    if not names:
        return None
    total = names[0]
    for name in names[1:]:
        total = w("Add", total, name)
    return total


def _keys_only(index: Index, name: str) -> str | None:
    """The mask as (batch|1, 1, 1, Lk) when it says the same for all heads and queries, looking through Expand."""
    for _ in range(3):
        shape = index.shape(name)
        if shape is not None and len(shape) == 4 and shape[1] == 1 and shape[2] == 1:
            return name
        node = index.made_by(name, "Expand", "Cast", "Identity")
        if node is None:
            return None
        name = node.input[0]
    return None


def _rank_of(index: Index, match: Match) -> int:
    """The largest rank among the masks, which the sum has."""
    ranks = [index.rank(name) for name in (*match.biases, *(m[0] for m in match.masks))]
    return max((r for r in ranks if r is not None), default=4)
