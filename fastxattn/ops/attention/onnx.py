"""How attention appears in an ONNX graph: the node ``fastxattn::Attention`` and its body in standard operators.

The node has the inputs of the torch operator (see :mod:`fastxattn.ops.attention.schema`), without dropout. All twelve
are always connected; an empty tensor stands for an absent one, so that one function serves every node of a file (a
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

from fastxattn.ops.onnx_node import DOMAIN, node
from fastxattn.ops.onnx_parts import (
    HIDDEN,
    NO_BIAS,
    NO_INTS,
    NO_KEY_BIAS,
    NO_RANGE,
    Inside,
    Poison,
    Sift,
    Slots,
    Softcap,
    Softmax,
    Spans,
    given,
)  # fmt: skip

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


NODE = node(Attention)


def translate(
    query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, query_index, key_index, kv_range, key_bias,
    bias, scale, softcap, dropout_p, dropout_seed,
):  # fmt: skip
    """The node for a call of ``fastxattn::attention_<backend>`` met by torch's exporter."""
    if dropout_p:
        raise ValueError(f"attention with dropout_p={dropout_p} cannot be exported; call module.eval() first")
    return NODE(
        query, key, value, cu_seqlens_q, cu_seqlens_k,
        *(given(t, NO_INTS) for t in (seqused_q, seqused_k, query_index, key_index)),
        given(kv_range, NO_RANGE), given(key_bias, NO_KEY_BIAS),
        op.Constant(value=NO_BIAS) if bias is None else op.Cast(bias, to=TensorProto.FLOAT),
        scale=scale, softcap=softcap,
    )  # fmt: skip


TRANSLATIONS = {f"attention_{backend}": translate for backend in ("cpu", "triton", "cuda")}


def bodies():
    """Portable bodies by node name and form."""
    from fastxattn.ops.attention.onnx_padded import AttentionPadded  # it imports this module

    return {"Attention": {"loop": Attention, "padded": AttentionPadded}}
