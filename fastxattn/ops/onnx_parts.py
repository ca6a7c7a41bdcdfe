"""Pieces that the portable bodies in ``ops/<op>/onnx.py`` share, and what puts them into a body.

Each piece is a function of its own here, and inlined when a body is written into a file: what a file carries is one
function per operator, made of standard operators alone.
"""
# ruff: noqa: SIM108
# mypy: ignore-errors

from __future__ import annotations

import onnx
import onnxscript
from onnx import TensorProto, helper
from onnx_ir.passes.common import InlinePass
from onnxscript import BOOL, FLOAT, INT32, INT64, ir, script, values
from onnxscript import opset18 as op

NO_INTS = helper.make_tensor("no_ints", TensorProto.INT32, [0], [])
NO_RANGE = helper.make_tensor("no_range", TensorProto.INT32, [0, 2], [])
NO_KEY_BIAS = helper.make_tensor("no_key_bias", TensorProto.FLOAT, [0], [])
NO_BIAS = helper.make_tensor("no_bias", TensorProto.FLOAT, [0, 0, 0, 0], [])
HIDDEN = helper.make_tensor("hidden", TensorProto.FLOAT, [], [float("-inf")])
NAN = helper.make_tensor("nan", TensorProto.FLOAT, [], [float("nan")])
PARTS = values.Opset("fastxattn.parts", 1)


def given(tensor, empty):
    """``tensor``, or the empty constant that stands for an absent one."""
    return op.Constant(value=empty) if tensor is None else tensor


@script(PARTS, default_opset=op)
def Spans(cu_seqlens: INT32, seqused: INT32) -> tuple[INT64, INT64]:
    """Where each sequence's slots start, and how many are in use; an empty ``seqused``: all."""
    v0, v1, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[-1])
    far = op.Constant(value_ints=[9223372036854775807])
    starts = op.Cast(op.Slice(cu_seqlens, v0, last), to=TensorProto.INT64)
    if op.Greater(op.Size(seqused), op.Constant(value_int=0)):
        used = op.Cast(seqused, to=TensorProto.INT64)
    else:
        used = op.Sub(op.Cast(op.Slice(cu_seqlens, v1, far), to=TensorProto.INT64), starts)
    return starts, used


@script(PARTS, default_opset=op)
def Slots(index: INT32, rows: INT64) -> INT64:
    """The row of each slot; an empty ``index``: its own place among the ``rows`` (1,)."""
    if op.Greater(op.Size(index), op.Constant(value_int=0)):
        row = op.Cast(index, to=TensorProto.INT64)
    else:
        row = op.Range(op.Constant(value_int=0), op.Squeeze(rows), op.Constant(value_int=1))
    return row


@script(PARTS, default_opset=op)
def Softcap(raw: FLOAT, cap: FLOAT, capped: BOOL) -> FLOAT:
    """cap * tanh(raw / cap) where ``capped``."""
    if capped:
        soft = op.Mul(op.Tanh(op.Div(raw, cap)), cap)
    else:
        soft = op.Identity(raw)
    return soft


@script(PARTS, default_opset=op)
def Inside(place: INT64, span: INT64) -> BOOL:
    """Whether a key's place lies in a query's [start, end), the last axis of ``span``."""
    v0, v1, v2 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    return op.And(op.GreaterOrEqual(place, op.Slice(span, v0, v1, last)), op.Less(place, op.Slice(span, v1, v2, last)))


@script(PARTS, default_opset=op)
def Sift(v: FLOAT, visible: BOOL) -> tuple[FLOAT, FLOAT]:
    """Values without what is not finite, and how much of that each query sees: 0 * NaN is NaN."""
    f_zero = op.Constant(value_float=0.0)
    broken = op.Not(op.Equal(op.Sub(v, v), f_zero))
    seen = op.MatMul(op.Cast(visible, to=TensorProto.FLOAT), op.Cast(broken, to=TensorProto.FLOAT))
    return op.Where(broken, f_zero, v), seen


@script(PARTS, default_opset=op)
def Poison(seen: FLOAT) -> FLOAT:
    """NaN for the queries that see what :func:`Sift` took out."""
    f_zero = op.Constant(value_float=0.0)
    return op.Where(op.Greater(seen, f_zero), op.Constant(value=NAN), f_zero)


@script(PARTS, default_opset=op)
def Softmax(scores: FLOAT) -> tuple[FLOAT, FLOAT, FLOAT]:
    """(weights, divisor, log-sum-exp) over the last axis; a row without keys has weights 0, divisor 1 and -inf."""
    last, f_zero = op.Constant(value_ints=[-1]), op.Constant(value_float=0.0)
    top = op.ReduceMax(scores, last, keepdims=1)
    base = op.Where(op.Equal(top, op.Constant(value=HIDDEN)), f_zero, top)
    weights = op.Exp(op.Sub(scores, base))
    total = op.ReduceSum(weights, last, keepdims=1)
    divisor = op.Where(op.Equal(total, f_zero), op.Constant(value_float=1.0), total)
    return weights, divisor, op.Squeeze(op.Add(base, op.Log(total)), last)


def inlined(body: onnxscript.OnnxFunction) -> onnx.FunctionProto:
    """``body`` with the pieces that it calls put in their places."""
    function = ir.serde.deserialize_function(body.to_function_proto())
    pieces = (Spans, Slots, Softcap, Inside, Sift, Poison, Softmax)
    parts = [ir.serde.deserialize_function(piece.to_function_proto()) for piece in pieces]
    model = ir.Model(function.graph, ir_version=10, functions=parts)
    InlinePass()(model)
    loop_conditions(model.graph)
    _rename(model.graph)
    whole = ir.Function(
        function.domain, function.name, graph=model.graph, attributes=list(function.attributes.values())
    )
    return ir.serde.serialize_function(whole)


def loop_conditions(graph):
    """Give every Loop without a condition a constant true one; onnx's reference evaluator reads none as false."""
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type == "Loop" and node.domain == "" and node.inputs[1] is None:
            always = ir.node("Constant", [], attributes={"value": ir.tensor(True, name="always")})
            always.outputs[0].name = "always"
            node.prepend(always)
            node.replace_input_with(1, always.outputs[0])


def _rename(graph):
    """One name for each value, branches included, and no shapes: a piece's annotations are read as rank 0."""
    taken = {value.name for value in graph.inputs}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        inner = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        for value in (*node.outputs, *(v for g in inner for v in g.inputs)):
            name, n = value.name, 1
            while value.name in taken:
                n += 1
                value.name = f"{name}_{n}"
            taken.add(value.name)
        for value in node.outputs:
            value.type = value.shape = None
