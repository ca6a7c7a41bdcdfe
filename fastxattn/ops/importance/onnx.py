"""Key importance in ONNX graphs: the node ``fastxattn::KeyImportance`` and its portable body.

Inputs are those of the torch operator, an empty tensor in place of None. The body is a Loop over sequences.
"""
# mypy: ignore-errors

from onnx import TensorProto
from onnxscript import FLOAT, INT32, script
from onnxscript import opset18 as op

from fastxattn.ops.attention.onnx import T
from fastxattn.ops.importance.problem import Problem
from fastxattn.ops.onnx_node import DOMAIN, call, node, translation
from fastxattn.ops.onnx_parts import HIDDEN, NO_KEY_BIAS, NO_RANGE, Inside, Slots, Softcap, Spans


@script(DOMAIN, default_opset=op)
def KeyImportance(
    query: T,
    key: T,
    lse: FLOAT,
    cu_seqlens_q: INT32,
    cu_seqlens_k: INT32,
    seqused_q: INT32,
    seqused_k: INT32,
    query_index: INT32,
    key_index: INT32,
    kv_range: INT32,
    key_bias: FLOAT,
    row_weight: FLOAT,
    scale: float,
    softcap: float = 0.0,
) -> FLOAT:
    """The portable body."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    v0, v1, v2 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    f_zero, f_one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    hidden = op.Constant(value=HIDDEN)
    cap = op.Constant(value_float=softcap)
    capped = op.Greater(cap, f_zero)
    rows_q, heads = op.Shape(query, start=0, end=1), op.Shape(query, start=1, end=2)
    rows_k, kv_heads = op.Shape(key, start=0, end=1), op.Shape(key, start=1, end=2)
    head_dim = op.Shape(query, start=2, end=3)
    group = op.Div(heads, kv_heads)
    has_range = op.Greater(op.Size(kv_range), zero)
    has_key_bias = op.Greater(op.Size(key_bias), zero)

    starts_q, used_q = Spans(cu_seqlens_q, seqused_q)
    starts_k, used_k = Spans(cu_seqlens_k, seqused_k)
    row_q, row_k = Slots(query_index, rows_q), Slots(key_index, rows_k)
    if op.Greater(op.Size(row_weight), zero):
        weight_all = op.Reshape(row_weight, op.Concat(last, rows_q, axis=0))  # (1 or heads, rows_q)
    else:
        weight_all = op.Expand(f_one, op.Concat(v1, rows_q, axis=0))
    scaled = op.Mul(op.Cast(query, to=TensorProto.FLOAT), op.Constant(value_float=scale))
    q_all = op.Transpose(scaled, perm=[1, 0, 2])  # (heads, rows_q, head_dim)
    k_all = op.Transpose(op.Cast(key, to=TensorProto.FLOAT), perm=[1, 2, 0])  # (kv_heads, head_dim, rows_k)

    parts = op.SequenceConstruct(op.Expand(f_zero, op.Concat(v0, heads, axis=0)))
    places = op.SequenceConstruct(op.Slice(row_k, v0, v0))
    for i in range(op.Size(starts_q)):
        at = op.Reshape(i, v1)
        from_q, from_k = op.Gather(starts_q, at), op.Gather(starts_k, at)
        lq, lk = op.Gather(used_q, at), op.Gather(used_k, at)
        to_k = op.Add(from_k, lk)
        if op.Greater(op.Squeeze(op.Mul(lq, lk)), zero):
            mine_q, mine_k = op.Slice(row_q, from_q, op.Add(from_q, lq)), op.Slice(row_k, from_k, to_k)
            q = op.Reshape(op.Gather(q_all, mine_q, axis=1), op.Concat(kv_heads, op.Mul(group, lq), head_dim, axis=0))
            raw = op.Reshape(op.MatMul(q, op.Gather(k_all, mine_k, axis=2)), op.Concat(heads, lq, lk, axis=0))
            soft = Softcap(raw, cap, capped)
            if has_key_bias:
                flat = op.Reshape(key_bias, op.Concat(rows_k, last, axis=0))
                by_key = op.Transpose(op.Gather(flat, mine_k, axis=0), perm=[1, 0])
                scores = op.Add(soft, op.Unsqueeze(by_key, v1))
            else:
                scores = op.Identity(soft)
            base = op.Unsqueeze(op.Gather(lse, mine_q, axis=1), v2)  # (heads, lq, 1)
            sees = op.Not(op.Equal(base, hidden))
            if has_range:
                span = op.Cast(op.Gather(kv_range, mine_q, axis=0), to=TensorProto.INT64)
                place = op.Unsqueeze(op.Range(zero, op.Squeeze(lk), one), v0)
                visible = op.And(sees, Inside(place, span))
            else:
                visible = op.Identity(sees)
            share = op.Where(visible, op.Exp(op.Sub(scores, base)), f_zero)
            weight = op.Unsqueeze(op.Gather(weight_all, mine_q, axis=1), v2)
            # A weight of a query that sees nothing is not multiplied in: it may be anything.
            summed = op.ReduceSum(op.Where(visible, op.Mul(share, weight), f_zero), v1, keepdims=0)
            part = op.Transpose(summed, perm=[1, 0])  # (lk, heads)
        else:
            part = op.Expand(f_zero, op.Concat(lk, heads, axis=0))
        parts = op.SequenceInsert(parts, part)
        places = op.SequenceInsert(places, op.Range(op.Squeeze(from_k), op.Squeeze(to_k), one))

    slots = op.Unsqueeze(op.ConcatFromSequence(places, axis=0), v1)
    nothing = op.Expand(f_zero, op.Concat(op.Shape(row_k), heads, axis=0))
    return op.Transpose(op.ScatterND(nothing, slots, op.ConcatFromSequence(parts, axis=0)), perm=[1, 0])


NODE = node(KeyImportance)
_EMPTY = {"kv_range": NO_RANGE, "key_bias": NO_KEY_BIAS, "row_weight": NO_KEY_BIAS}


@translation(Problem)
def translate(problem):
    """The node for a call of ``fastxattn::importance_<backend>`` met by torch's exporter."""
    return call(NODE, problem, _EMPTY)


TRANSLATIONS = {f"importance_{backend}": translate for backend in ("cpu", "triton")}


def bodies():
    """Portable bodies by node name and form."""
    return {"KeyImportance": {"loop": KeyImportance}}
