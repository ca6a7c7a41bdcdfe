"""Absorbed attention in ONNX graphs: the node ``fastxattn::AbsorbedAttention`` and its portable body.

An empty tensor stands for an absent ``kv_range`` or ``key_bias``. The body is a Loop over sequences.
"""
# ruff: noqa: SIM108
# mypy: ignore-errors

from onnx import TensorProto
from onnxscript import FLOAT, INT32, script
from onnxscript import opset18 as op

from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.attention.onnx import T
from fastxattn.ops.onnx_node import DOMAIN, call, node, translation
from fastxattn.ops.onnx_parts import HIDDEN, NO_KEY_BIAS, NO_RANGE, Inside, Poison, Sift, Softmax


@script(DOMAIN, default_opset=op)
def AbsorbedAttention(
    query: T, context: T, cu_seqlens_q: INT32, cu_seqlens_k: INT32, kv_range: INT32, key_bias: FLOAT, scale: float
) -> tuple[T, FLOAT]:
    """The portable body."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    v0, v1 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    last, far = op.Constant(value_ints=[-1]), op.Constant(value_ints=[9223372036854775807])
    f_zero, hidden = op.Constant(value_float=0.0), op.Constant(value=HIDDEN)
    heads, width = op.Shape(query, start=1, end=2), op.Shape(query, start=2, end=3)
    has_range = op.Greater(op.Size(kv_range), zero)
    has_key_bias = op.Greater(op.Size(key_bias), zero)
    starts_q, starts_k = op.Slice(cu_seqlens_q, v0, last), op.Slice(cu_seqlens_k, v0, last)
    ends_q, ends_k = op.Slice(cu_seqlens_q, v1, far), op.Slice(cu_seqlens_k, v1, far)
    q_all = op.Mul(op.Cast(query, to=TensorProto.FLOAT), op.Constant(value_float=scale))
    c_all = op.Cast(context, to=TensorProto.FLOAT)

    outs = op.SequenceConstruct(op.Expand(f_zero, op.Concat(v0, heads, width, axis=0)))
    lses = op.SequenceConstruct(op.Expand(f_zero, op.Concat(v0, heads, axis=0)))
    for i in range(op.Size(starts_q)):
        at = op.Reshape(i, v1)
        from_q, from_k = op.Gather(starts_q, at), op.Gather(starts_k, at)
        to_q, to_k = op.Gather(ends_q, at), op.Gather(ends_k, at)
        q3, c = op.Slice(q_all, from_q, to_q), op.Slice(c_all, from_k, to_k)
        lq, lk = op.Shape(q3, start=0, end=1), op.Shape(c, start=0, end=1)
        shape = op.Concat(lq, heads, width, axis=0)
        if op.Greater(op.Squeeze(op.Mul(lq, lk)), zero):
            q = op.Reshape(q3, op.Concat(last, width, axis=0))
            raw = op.Reshape(op.MatMul(q, op.Transpose(c, perm=[1, 0])), op.Concat(lq, heads, lk, axis=0))
            if has_key_bias:
                biased = op.Add(raw, op.Slice(key_bias, from_k, to_k))
            else:
                biased = op.Identity(raw)
            if has_range:
                span = op.Cast(op.Unsqueeze(op.Slice(kv_range, from_q, to_q), v1), to=TensorProto.INT64)  # (lq, 1, 2)
                place = op.Range(zero, op.Squeeze(lk), one)
                visible = Inside(place, span)
                scores = op.Where(visible, biased, hidden)
                values, seen = Sift(c, visible)
                poison = Poison(seen)  # (lq, 1, width)
            else:
                scores = op.Identity(biased)
                values = op.Identity(c)
                poison = op.Identity(f_zero)
            weights, divisor, lse_i = Softmax(scores)
            flat = op.Reshape(weights, op.Concat(last, lk, axis=0))
            mixed = op.Reshape(op.MatMul(flat, values), shape)
            out_i = op.Div(op.Add(mixed, poison), divisor)
        else:
            out_i = op.Expand(f_zero, shape)
            lse_i = op.Expand(hidden, op.Concat(lq, heads, axis=0))
        outs = op.SequenceInsert(outs, out_i)
        lses = op.SequenceInsert(lses, lse_i)

    # Queries past the last offset belong to no sequence: 0 and -inf.
    out_used, lse_used = op.ConcatFromSequence(outs, axis=0), op.ConcatFromSequence(lses, axis=0)
    rest = op.Sub(op.Shape(query, start=0, end=1), op.Shape(out_used, start=0, end=1))
    out = op.Concat(out_used, op.Expand(f_zero, op.Concat(rest, heads, width, axis=0)), axis=0)
    lse = op.Concat(lse_used, op.Expand(hidden, op.Concat(rest, heads, axis=0)), axis=0)
    return op.CastLike(out, query), op.Transpose(lse, perm=[1, 0])


NODE = node(AbsorbedAttention)


@translation(Problem)
def translate(problem):
    """The node for a call of ``fastxattn::absorbed_attention_<backend>`` met by torch's exporter."""
    out, lse = call(NODE, problem, {"kv_range": NO_RANGE, "key_bias": NO_KEY_BIAS})
    # The third result, (2, heads, rows), only serves a backward pass: no node reads it, so that it is removed.
    one = op.Unsqueeze(lse, op.Constant(value_ints=[0]))
    return out, lse, op.Concat(one, one, axis=0)


TRANSLATIONS = {"absorbed_attention_cpu": translate}


def bodies():
    """Portable bodies by node name and form."""
    return {"AbsorbedAttention": {"loop": AbsorbedAttention}}
