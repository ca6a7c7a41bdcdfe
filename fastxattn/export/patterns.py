"""Finding attention in somebody else's ONNX graph: the standard operator, the contrib one, decomposed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

LOWEST = -1e30
"""Additive masks at or below this hide a key; anything above is a bias to be added."""


class Index:
    """Who makes and who reads each value of a graph, what is constant, and the shapes that inference finds."""

    def __init__(self, model: onnx.ModelProto) -> None:
        # Where inference fails, shapes stay what the file says.
        with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        graph = model.graph
        self.nodes = list(graph.node)
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.constants = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.values = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}

    def made_by(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node of one of ``kinds`` that makes ``name``, or None."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type in kinds and node.domain in ("", "ai.onnx") else None

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """Sizes of a value, a name or None where a size is open; None when not even the rank is known."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in value.type.tensor_type.shape.dim
        )

    def rank(self, name: str) -> int | None:
        """Number of axes, or None."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def scalar(self, name: str) -> float | None:
        """The value of a constant with one element, else None."""
        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).reshape(-1)[0])


@dataclass
class Match:
    """One attention subgraph, and what a rewrite needs to know of it."""

    kind: str  # Attention | MultiHeadAttention | decomposed
    node: onnx.NodeProto
    """The node whose output is the attention's output."""
    query: str = ""
    key: str = ""
    value: str = ""
    scale: float | None = None
    """None: 1 / sqrt(head_dim)."""
    softcap: float = 0.0
    causal: bool = False
    heads: int | None = None
    """Query heads of 3-D inputs (batch, length, heads x dim); None: inputs are (batch, heads, length, dim)."""
    kv_heads: int | None = None
    key_transposed: bool = False
    """``key`` is (batch, heads, dim, length)."""
    biases: list[str] = field(default_factory=list)
    """Additive masks, broadcasting to (batch, heads, Lq, Lk)."""
    masks: list[tuple[str, bool, float]] = field(default_factory=list)
    """Boolean masks: (name, what it is where a key is visible, what hidden scores become)."""
    lengths: str | None = None
    """(batch,) int32 numbers of keys."""
    key_mask: str | None = None
    """(batch, Lk) integers or booleans, nonzero where a key is visible."""
    refused: str | None = None
    """Why it cannot be rewritten; None: it can."""


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    found = [a for a in node.attribute if a.name == name]
    return onnx.helper.get_attribute_value(found[0]) if found else default


def find(index: Index) -> Iterator[Match]:
    """Every attention subgraph, those that cannot be rewritten with the reason."""
    for node in index.nodes:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield _standard(index, node)
        elif node.op_type == "MultiHeadAttention" and node.domain == "com.microsoft":
            yield _contrib(index, node)
        elif node.op_type == "Softmax" and (match := _decomposed(index, node)) is not None:
            yield match


def _standard(index: Index, node: onnx.NodeProto) -> Match:
    names = [*node.input, *[""] * 7]
    match = Match("Attention", node, *names[:3])
    match.scale = attribute(node, "scale")
    match.softcap = attribute(node, "softcap", 0.0)
    match.causal = bool(attribute(node, "is_causal", 0))
    rank = index.rank(names[0])
    if any(names[4:7]):
        match.refused = "it carries a key/value cache"
    elif len([o for o in node.output if o]) > 1:
        match.refused = "more than its first output is used"
    elif rank == 3:
        match.heads, match.kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
    elif rank != 4:
        match.refused = "the rank of its query is not known"
    if names[3]:
        value = index.values.get(names[3])
        boolean = value is not None and value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        constant = index.constants.get(names[3])
        if boolean or (constant is not None and constant.data_type == onnx.TensorProto.BOOL):
            match.masks.append((names[3], True, float("-inf")))
        else:
            match.biases.append(names[3])
    return match


def _contrib(index: Index, node: onnx.NodeProto) -> Match:
    names = [*node.input, *[""] * 10]
    match = Match("MultiHeadAttention", node, *names[:3])
    match.heads = match.kv_heads = attribute(node, "num_heads")
    match.scale = attribute(node, "scale")
    match.causal = bool(attribute(node, "unidirectional", 0))
    if any(names[6:10]) or len([o for o in node.output if o]) > 1:
        match.refused = "it carries a key/value cache"
    elif names[3]:
        match.refused = "it adds a packed projection bias"
    elif not (names[1] and names[2]) or [index.rank(n) for n in names[:3]] != [3, 3, 3]:
        match.refused = "its query, key and value are not three tensors of rank 3"
    if names[4]:
        rank = index.rank(names[4])
        if rank == 1:
            match.lengths = names[4]
        elif rank == 2:
            match.key_mask = names[4]
        else:
            match.refused = "its padding mask has rank " + str(rank)
    if names[5]:
        match.biases.append(names[5])
    return match


def _decomposed(index: Index, softmax: onnx.NodeProto) -> Match | None:
    """Softmax(scores) @ value, scores being a product of two tensors, scaled and masked; None: not attention."""
    axis = attribute(softmax, "axis", -1)
    weights = softmax.output[0]
    readers = index.consumers.get(weights, [])
    # Exporters guard rows without keys: Where(IsNaN(w), 0, w).
    if {n.op_type for n in readers} == {"IsNaN", "Where"}:
        guard = next(n for n in readers if n.op_type == "Where")
        weights, readers = guard.output[0], index.consumers.get(guard.output[0], [])
    while len(readers) == 1 and readers[0].op_type in ("Identity", "Cast", "Dropout"):
        weights = readers[0].output[0]
        readers = index.consumers.get(weights, [])
    if len(readers) != 1 or readers[0].op_type != "MatMul" or readers[0].input[0] != weights:
        return None
    match = Match("decomposed", readers[0], value=readers[0].input[1], scale=1.0)
    product = _peel(index, match, softmax.input[0])
    if product is None:
        return None
    match.query, match.key, match.key_transposed = product.input[0], product.input[1], True
    transpose = index.made_by(match.key, "Transpose")
    perm = list(attribute(transpose, "perm", [])) if transpose is not None else []
    if transpose is not None and perm[:2] == [0, 1] and perm[2:] == [3, 2]:
        match.key, match.key_transposed = transpose.input[0], False
    match.query, match.key = (_unscale(index, match, name) for name in (match.query, match.key))
    ranks = [index.rank(name) for name in (match.query, match.key, match.value)]
    if ranks != [4, 4, 4]:
        match.refused = f"query, key and value have ranks {ranks}, not 4"
    elif axis not in (-1, 3):
        match.refused = "the softmax is not over the keys"
    elif weights in index.outputs or softmax.output[0] in index.outputs:
        match.refused = "the attention map is an output of the model"
    return match


def _peel(index: Index, match: Match, name: str) -> onnx.NodeProto | None:
    """Walk from the softmax up to the product, noting scales, masks and biases."""
    for _ in range(8):
        node = index.producer.get(name)
        if node is None:
            return None
        if node.op_type == "MatMul":
            return node
        scalars = [index.scalar(n) for n in node.input]
        if node.op_type in ("Mul", "Div") and any(s is not None for s in scalars):
            place = next(i for i, s in enumerate(scalars) if s is not None)
            if node.op_type == "Div" and place == 0:
                return None
            factor = scalars[place] if node.op_type == "Mul" else 1.0 / (scalars[place] or 1.0)
            assert match.scale is not None
            match.scale *= factor or 0.0
            name = node.input[1 - place]
        elif node.op_type == "Add":
            side = next((i for i in (0, 1) if _leads_to_product(index, node.input[i])), None)
            if side is None or match.scale != 1.0:  # a factor above the bias would scale the bias too
                return None
            match.biases.append(node.input[1 - side])
            name = node.input[side]
        elif node.op_type == "Where":
            fills = [index.scalar(n) for n in node.input]
            place = 2 if fills[2] is not None else 1
            if fills[place] is None or match.scale != 1.0:
                return None
            match.masks.append((node.input[0], place == 2, fills[place] or 0.0))
            name = node.input[3 - place]
        elif node.op_type in ("Identity", "Cast"):
            name = node.input[0]
        else:
            return None
    return None


def _leads_to_product(index: Index, name: str) -> bool:
    for _ in range(8):
        node = index.producer.get(name)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type not in ("Mul", "Div", "Add", "Where", "Identity", "Cast"):
            return False
        name = next((n for n in node.input if index.scalar(n) is None), "")
    return False


def _unscale(index: Index, match: Match, name: str) -> str:
    """Factors that an exporter put on query and key (each the root of the scale) move into the node's scale."""
    node = index.made_by(name, "Mul")
    if node is None:
        return name
    scalars = [index.scalar(n) for n in node.input]
    place = next((i for i, s in enumerate(scalars) if s is not None), None)
    if place is None:
        return name
    assert match.scale is not None
    match.scale *= scalars[place] or 0.0
    return str(node.input[1 - place])
