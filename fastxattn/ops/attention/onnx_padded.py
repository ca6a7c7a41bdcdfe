"""Attention's portable body without loops and sequences, for runtimes that lack them: one masked product.

Costs batch x longest queries x longest keys whatever the lengths. A row of zeros behind the data stands for every
absent token, so that what lies there never enters a product.
"""
# mypy: ignore-errors

from onnx import TensorProto
from onnxscript import FLOAT, INT32, script
from onnxscript import opset18 as op

from fastxattn.ops.attention.onnx import T
from fastxattn.ops.onnx_node import DOMAIN
from fastxattn.ops.onnx_parts import HIDDEN, Inside, Poison, Sift, Slots, Softcap, Softmax, Spans


@script(DOMAIN, default_opset=op)
def AttentionPadded(
    query: T, key: T, value: T, cu_seqlens_q: INT32, cu_seqlens_k: INT32, seqused_q: INT32, seqused_k: INT32,
    query_index: INT32, key_index: INT32, kv_range: INT32, key_bias: FLOAT, bias: FLOAT, scale: float,
    softcap: float = 0.0,
) -> tuple[T, FLOAT]:  # fmt: skip
    """Inputs and outputs are those of :func:`fastxattn.ops.attention.onnx.Attention`."""
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

    # Back to rows; what absent tokens gave lands in the row behind the data and is cut off.
    rows_more = op.Add(rows_q, v1)
    target = op.Unsqueeze(row_q, v2)
    out_rows = op.ScatterND(op.Expand(f_zero, op.Concat(rows_more, heads, value_dim, axis=0)), target, out_padded)
    lse_rows = op.ScatterND(op.Expand(hidden, op.Concat(rows_more, heads, axis=0)), target, lse_padded)
    out = op.CastLike(op.Slice(out_rows, v0, rows_q, v0), query)
    return out, op.Transpose(op.Slice(lse_rows, v0, rows_q, v0), perm=[1, 0])
