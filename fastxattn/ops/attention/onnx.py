"""How attention appears in an ONNX graph: the node ``fastxattn::Attention`` and its body in standard operators.

The node has the inputs of the torch operator (see :class:`fastxattn.ops.attention.problem.Problem`), without dropout.
All are always connected; an empty tensor stands for an absent one, so that one function serves every node of a file (a
runtime as old as 1.20 knows one body per name). That loses nothing: where a present tensor is empty, both readings
give the same result.

The body is a Loop over sequences that appends each result to a tensor sequence: no padding and no mask, so what lies
outside a sequence never enters a product. No keys gives 0 and -inf; empty batches and lengths are ordinary.
Under ``kv_range``, an infinite value at a visible key gives NaN where the kernel gives infinity.
"""
# ruff: noqa: SIM108
# mypy: ignore-errors

from typing import TypeVar, Union

from onnx import TensorProto
from onnxscript import BFLOAT16, FLOAT, FLOAT16, INT32, script
from onnxscript import opset18 as op

from fastxattn.ops.attention.problem import Problem
from fastxattn.ops.onnx_node import DOMAIN, call, node, translation
from fastxattn.ops.onnx_parts import (
    HIDDEN,
    NO_BIAS,
    NO_KEY_BIAS,
    NO_RANGE,
    Inside,
    Poison,
    Sift,
    Slots,
    Softcap,
    Softmax,
    Spans,
)

T = TypeVar("T", bound=Union[FLOAT, FLOAT16, BFLOAT16])  # noqa: UP007  (onnxscript reads this form)


@script(DOMAIN, default_opset=op)
def Attention(
    query: T, key: T, value: T, cu_seqlens_q: INT32, cu_seqlens_k: INT32, seqused_q: INT32, seqused_k: INT32,
    query_index: INT32, key_index: INT32, kv_range: INT32, key_bias: FLOAT, bias: FLOAT, scale: float,
    softcap: float = 0.0,
) -> tuple[T, FLOAT]:  # fmt: skip
    """The portable body."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    v0, v1, v2 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    last, far = op.Constant(value_ints=[-1]), op.Constant(value_ints=[9223372036854775807])
    f_zero, hidden = op.Constant(value_float=0.0), op.Constant(value=HIDDEN)
    cap = op.Constant(value_float=softcap)
    capped = op.Greater(cap, f_zero)
    rows_q, heads = op.Shape(query, start=0, end=1), op.Shape(query, start=1, end=2)
    rows_k, kv_heads = op.Shape(key, start=0, end=1), op.Shape(key, start=1, end=2)
    head_dim, value_dim = op.Shape(query, start=2, end=3), op.Shape(value, start=2, end=3)
    group = op.Div(heads, kv_heads)
    has_range = op.Greater(op.Size(kv_range), zero)
    has_key_bias = op.Greater(op.Size(key_bias), zero)
    has_bias = op.Greater(op.Size(bias), zero)

    starts_q, used_q = Spans(cu_seqlens_q, seqused_q)
    starts_k, used_k = Spans(cu_seqlens_k, seqused_k)

    # Everything in slot order and float32; heads first.
    query_rows = op.Mul(op.Cast(query, to=TensorProto.FLOAT), op.Constant(value_float=scale))
    key_rows, value_rows = op.Cast(key, to=TensorProto.FLOAT), op.Cast(value, to=TensorProto.FLOAT)
    # Slots that are not in use may name any row.
    row_q = op.Clip(Slots(query_index, rows_q), zero, op.Sub(op.Squeeze(rows_q), one))
    row_k = op.Clip(Slots(key_index, rows_k), zero, op.Sub(op.Squeeze(rows_k), one))
    if op.Greater(op.Size(query_index), zero):
        q_slots = op.Gather(query_rows, row_q, axis=0)
    else:
        q_slots = op.Identity(query_rows)
    if op.Greater(op.Size(key_index), zero):
        k_slots = op.Gather(key_rows, row_k, axis=0)
        v_slots = op.Gather(value_rows, row_k, axis=0)
    else:
        k_slots = op.Identity(key_rows)
        v_slots = op.Identity(value_rows)
    if has_key_bias:
        by_row = op.Gather(op.Reshape(key_bias, op.Concat(rows_k, last, axis=0)), row_k, axis=0)
        bias_all = op.Unsqueeze(op.Transpose(by_row, perm=[1, 0]), v1)  # (1 or heads, 1, slots)
    else:
        bias_all = op.Reshape(f_zero, op.Concat(v1, v1, v1, axis=0))
    q_all = op.Transpose(q_slots, perm=[1, 0, 2])  # (heads, slots, head_dim)
    k_all = op.Transpose(k_slots, perm=[1, 2, 0])  # (kv_heads, head_dim, slots)
    v_all = op.Transpose(v_slots, perm=[1, 0, 2])  # (kv_heads, slots, value_dim)

    outs = op.SequenceConstruct(op.Expand(f_zero, op.Concat(heads, v0, value_dim, axis=0)))
    lses = op.SequenceConstruct(op.Expand(f_zero, op.Concat(heads, v0, axis=0)))
    rows = op.SequenceConstruct(op.Slice(row_q, v0, v0))
    for i in range(op.Size(starts_q)):
        at = op.Reshape(i, v1)
        from_q, from_k = op.Gather(starts_q, at), op.Gather(starts_k, at)
        lq, lk = op.Gather(used_q, at), op.Gather(used_k, at)
        to_q, to_k = op.Add(from_q, lq), op.Add(from_k, lk)
        if op.Greater(op.Squeeze(op.Mul(lq, lk)), zero):
            q = op.Reshape(op.Slice(q_all, from_q, to_q, v1), op.Concat(kv_heads, op.Mul(group, lq), head_dim, axis=0))
            products = op.MatMul(q, op.Slice(k_all, from_k, to_k, v2))
            raw = op.Reshape(products, op.Concat(heads, lq, lk, axis=0))
            soft = Softcap(raw, cap, capped)
            if has_key_bias:
                keyed = op.Add(soft, op.Slice(bias_all, from_k, to_k, v2))
            else:
                keyed = op.Identity(soft)
            if has_bias:
                # A bias axis of size 1 broadcasts: its only place is 0.
                b_sizes = op.Sub(op.Shape(bias), op.Constant(value_ints=[1, 1, 1, 1]))
                own = op.Gather(bias, op.Min(at, op.Slice(b_sizes, v0, v1)), axis=0)
                place_q = op.Sub(op.Slice(row_q, from_q, to_q), from_q)
                place_k = op.Sub(op.Slice(row_k, from_k, to_k), from_k)
                own_q = op.Gather(own, op.Min(place_q, op.Slice(b_sizes, v2, op.Constant(value_ints=[3]))), axis=2)
                own_k = op.Gather(own_q, op.Min(place_k, op.Slice(b_sizes, op.Constant(value_ints=[3]), far)), axis=3)
                biased = op.Add(keyed, op.Cast(op.Squeeze(own_k, v0), to=TensorProto.FLOAT))
            else:
                biased = op.Identity(keyed)
            v = op.Slice(v_all, from_k, to_k, v1)
            if has_range:
                span = op.Cast(op.Gather(kv_range, op.Slice(row_q, from_q, to_q), axis=0), to=TensorProto.INT64)
                key_place = op.Unsqueeze(op.Range(zero, op.Squeeze(lk), one), v0)
                visible = Inside(key_place, span)
                scores = op.Where(visible, biased, hidden)
                v_clean, seen = Sift(v, visible)
                seen_by_head = op.Reshape(
                    op.Expand(op.Unsqueeze(seen, v1), op.Concat(kv_heads, group, lq, value_dim, axis=0)),
                    op.Concat(kv_heads, op.Mul(group, lq), value_dim, axis=0),
                )
                poison = Poison(seen_by_head)
            else:
                scores = op.Identity(biased)
                v_clean = op.Identity(v)
                poison = op.Identity(f_zero)
            weights, divisor, lse_i = Softmax(scores)
            grouped = op.Reshape(weights, op.Concat(kv_heads, op.Mul(group, lq), lk, axis=0))
            mixed = op.Reshape(op.Add(op.MatMul(grouped, v_clean), poison), op.Concat(heads, lq, value_dim, axis=0))
            out_i = op.Div(mixed, divisor)
        else:
            out_i = op.Expand(f_zero, op.Concat(heads, lq, value_dim, axis=0))
            lse_i = op.Expand(hidden, op.Concat(heads, lq, axis=0))
        outs = op.SequenceInsert(outs, out_i)
        lses = op.SequenceInsert(lses, lse_i)
        rows = op.SequenceInsert(rows, op.Slice(row_q, from_q, to_q))

    # Back to rows; those that no slot in use stands for keep 0 and -inf.
    named = op.Unsqueeze(op.ConcatFromSequence(rows, axis=0), v1)
    packed = op.Transpose(op.ConcatFromSequence(outs, axis=1), perm=[1, 0, 2])
    out = op.ScatterND(op.Expand(f_zero, op.Concat(rows_q, heads, value_dim, axis=0)), named, packed)
    lse_packed = op.Transpose(op.ConcatFromSequence(lses, axis=1), perm=[1, 0])
    lse = op.ScatterND(op.Expand(hidden, op.Concat(rows_q, heads, axis=0)), named, lse_packed)
    return op.CastLike(out, query), op.Transpose(lse, perm=[1, 0])


@script(DOMAIN, default_opset=op)
def AttentionPadded(
    query: T, key: T, value: T, cu_seqlens_q: INT32, cu_seqlens_k: INT32, seqused_q: INT32, seqused_k: INT32,
    query_index: INT32, key_index: INT32, kv_range: INT32, key_bias: FLOAT, bias: FLOAT, scale: float,
    softcap: float = 0.0,
) -> tuple[T, FLOAT]:  # fmt: skip
    """The portable body without loops and sequences, for runtimes that lack them: one masked product.

    Costs batch x longest queries x longest keys whatever the lengths. A row of zeros behind the data stands for all
    padding, so that what lies there never enters a product.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    v0, v1, v2 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    v3, last = op.Constant(value_ints=[3]), op.Constant(value_ints=[-1])
    far = op.Constant(value_ints=[9223372036854775807])
    f_zero, hidden = op.Constant(value_float=0.0), op.Constant(value=HIDDEN)
    cap = op.Constant(value_float=softcap)
    capped = op.Greater(cap, f_zero)
    rows_q, heads = op.Shape(query, start=0, end=1), op.Shape(query, start=1, end=2)
    rows_k, kv_heads = op.Shape(key, start=0, end=1), op.Shape(key, start=1, end=2)
    head_dim, value_dim = op.Shape(query, start=2, end=3), op.Shape(value, start=2, end=3)
    group = op.Div(heads, kv_heads)
    has_range = op.Greater(op.Size(kv_range), zero)

    starts_q, used_q = Spans(cu_seqlens_q, seqused_q)
    starts_k, used_k = Spans(cu_seqlens_k, seqused_k)
    batch = op.Shape(starts_q)
    named_q, named_k = Slots(query_index, rows_q), Slots(key_index, rows_k)

    # (batch, longest) rows; where there is no token, the row of zeros behind the data.
    longest_q = op.ReduceMax(op.Concat(v1, used_q, axis=0), v0, keepdims=1)
    longest_k = op.ReduceMax(op.Concat(v1, used_k, axis=0), v0, keepdims=1)
    place_q = op.Unsqueeze(op.Range(zero, op.Squeeze(longest_q), one), v0)
    place_k = op.Unsqueeze(op.Range(zero, op.Squeeze(longest_k), one), v0)
    from_q, from_k = op.Unsqueeze(starts_q, v1), op.Unsqueeze(starts_k, v1)
    valid_q = op.Less(place_q, op.Unsqueeze(used_q, v1))
    valid_k = op.Less(place_k, op.Unsqueeze(used_k, v1))
    row_q = op.Gather(op.Concat(named_q, rows_q, axis=0), op.Where(valid_q, op.Add(place_q, from_q), op.Shape(named_q)))
    row_k = op.Gather(op.Concat(named_k, rows_k, axis=0), op.Where(valid_k, op.Add(place_k, from_k), op.Shape(named_k)))

    zeros_q = op.Expand(f_zero, op.Concat(v1, heads, head_dim, axis=0))
    zeros_k = op.Expand(f_zero, op.Concat(v1, kv_heads, head_dim, axis=0))
    zeros_v = op.Expand(f_zero, op.Concat(v1, kv_heads, value_dim, axis=0))
    scaled = op.Mul(op.Cast(query, to=TensorProto.FLOAT), op.Constant(value_float=scale))
    q_rows = op.Gather(op.Concat(scaled, zeros_q, axis=0), row_q)
    k_rows = op.Gather(op.Concat(op.Cast(key, to=TensorProto.FLOAT), zeros_k, axis=0), row_k)
    v_rows = op.Gather(op.Concat(op.Cast(value, to=TensorProto.FLOAT), zeros_v, axis=0), row_k)
    q = op.Reshape(
        op.Transpose(q_rows, perm=[0, 2, 1, 3]),
        op.Concat(batch, kv_heads, op.Mul(group, longest_q), head_dim, axis=0), allowzero=1,
    )  # fmt: skip
    k = op.Transpose(k_rows, perm=[0, 2, 3, 1])
    v = op.Transpose(v_rows, perm=[0, 2, 1, 3])
    full = op.Concat(batch, heads, longest_q, longest_k, axis=0)
    raw = op.Reshape(op.MatMul(q, k), full, allowzero=1)
    soft = Softcap(raw, cap, capped)
    if op.Greater(op.Size(key_bias), zero):
        flat = op.Reshape(key_bias, op.Concat(rows_k, last, axis=0))
        extra = op.Expand(f_zero, op.Concat(v1, op.Shape(flat, start=1, end=2), axis=0))
        by_key = op.Gather(op.Concat(flat, extra, axis=0), row_k)  # (batch, longest_k, 1 or heads)
        keyed = op.Add(soft, op.Unsqueeze(op.Transpose(by_key, perm=[0, 2, 1]), v2))
    else:
        keyed = op.Identity(soft)
    if op.Greater(op.Size(bias), zero):
        # Indexed by a row's place in its sequence; an axis of size 1 broadcasts.
        tops = op.Sub(op.Shape(bias), op.Constant(value_ints=[1, 1, 1, 1]))
        own = op.Gather(bias, op.Min(op.Range(zero, op.Squeeze(batch), one), op.Slice(tops, v0, v1)), axis=0)
        at_q = op.Max(op.Min(op.Sub(row_q, from_q), op.Slice(tops, v2, v3)), v0)
        at_k = op.Max(op.Min(op.Sub(row_k, from_k), op.Slice(tops, v3, far)), v0)
        bias_heads, bias_keys = op.Shape(bias, start=1, end=2), op.Shape(bias, start=3, end=4)
        pick_q = op.Expand(
            op.Unsqueeze(at_q, op.Constant(value_ints=[1, 3])),
            op.Concat(batch, bias_heads, longest_q, bias_keys, axis=0),
        )
        own_q = op.GatherElements(own, pick_q, axis=2)
        pick_k = op.Expand(
            op.Unsqueeze(at_k, op.Constant(value_ints=[1, 2])),
            op.Concat(batch, bias_heads, longest_q, longest_k, axis=0),
        )
        biased = op.Add(keyed, op.GatherElements(own_q, pick_k, axis=3))
    else:
        biased = op.Identity(keyed)
    present = op.Unsqueeze(valid_k, op.Constant(value_ints=[1, 2]))  # (batch, 1, 1, longest_k)
    if has_range:
        nothing = op.Expand(op.Cast(zero, to=TensorProto.INT64), op.Concat(v1, v2, axis=0))
        spans = op.Concat(op.Cast(kv_range, to=TensorProto.INT64), nothing, axis=0)
        span = op.Unsqueeze(op.Gather(spans, row_q), v1)  # (batch, 1, longest_q, 2)
        visible = op.And(present, Inside(place_k, span))
        v_clean, seen = Sift(v, visible)
        five = op.Concat(batch, kv_heads, group, longest_q, value_dim, axis=0)
        seen_by_head = op.Reshape(
            op.Expand(op.Unsqueeze(seen, v2), five), op.Concat(batch, heads, longest_q, value_dim, axis=0), allowzero=1
        )
        poison = Poison(seen_by_head)
    else:
        visible = op.Identity(present)
        v_clean = op.Identity(v)
        poison = op.Identity(f_zero)
    scores = op.Where(visible, biased, hidden)
    weights, divisor, lse_by_head = Softmax(scores)
    grouped = op.Reshape(weights, op.Concat(batch, kv_heads, op.Mul(group, longest_q), longest_k, axis=0), allowzero=1)
    mixed = op.Reshape(op.MatMul(grouped, v_clean), op.Concat(batch, heads, longest_q, value_dim, axis=0), allowzero=1)
    out_padded = op.Transpose(op.Div(op.Add(mixed, poison), divisor), perm=[0, 2, 1, 3])
    lse_padded = op.Transpose(lse_by_head, perm=[0, 2, 1])

    # Back to rows; results of padding land in the row behind the data and are cut off.
    rows_more = op.Add(rows_q, v1)
    target = op.Unsqueeze(row_q, v2)
    out_rows = op.ScatterND(op.Expand(f_zero, op.Concat(rows_more, heads, value_dim, axis=0)), target, out_padded)
    lse_rows = op.ScatterND(op.Expand(hidden, op.Concat(rows_more, heads, axis=0)), target, lse_padded)
    out = op.CastLike(op.Slice(out_rows, v0, rows_q, v0), query)
    return out, op.Transpose(op.Slice(lse_rows, v0, rows_q, v0), perm=[1, 0])


NODE = node(Attention)
_EMPTY = {"kv_range": NO_RANGE, "key_bias": NO_KEY_BIAS, "bias": NO_BIAS}
"""What stands for an absent input; an empty int32 vector for all others."""


@translation(Problem)
def translate(problem):
    """The node for a call of ``fastxattn::attention_<backend>`` met by torch's exporter."""
    if problem.dropout_p:
        raise ValueError(f"attention with dropout_p={problem.dropout_p} cannot be exported; call module.eval() first")
    bias = None if problem.bias is None else op.Cast(problem.bias, to=TensorProto.FLOAT)
    return call(NODE, problem.replace(bias=bias), _EMPTY)


TRANSLATIONS = {f"attention_{backend}": translate for backend in ("cpu", "triton", "cuda")}


def bodies():
    """Portable bodies by node name and form."""
    return {"Attention": {"loop": Attention, "padded": AttentionPadded}}
