"""How token pruning appears in an ONNX graph.

Selection is the node ``fastxattn::Select`` with a portable body of standard operators; gathering and merging rows are
standard operators outright, since a runtime's own gather and scatter are all there is to them. Matching, greedy
searches and quantiles have no ONNX form: the strategies built on them run before the exported model.
"""
# mypy: ignore-errors

from onnx import TensorProto, helper
from onnxscript import BOOL, FLOAT, INT32, INT64, script
from onnxscript import opset18 as op

from fastxattn.ops.onnx_node import DOMAIN, node
from fastxattn.ops.onnx_parts import HIDDEN, given

NONE_PROTECTED = helper.make_tensor("none_protected", TensorProto.BOOL, [0], [])


@script(DOMAIN, default_opset=op)
def Select(
    scores: FLOAT, cu_seqlens: INT32, counts: INT32, capacity: INT64, protected: BOOL
) -> tuple[INT32, INT32, INT32]:
    """The portable body: two stable sorts, by score and then by (sequence, not protected, NaN)."""
    zero = op.Constant(value_int=0)
    v0, v1 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    last, far = op.Constant(value_ints=[-1]), op.Constant(value_ints=[9223372036854775807])
    hidden = op.Constant(value=HIDDEN)
    total = op.Shape(scores)
    rows = op.Reshape(capacity, v1)
    cu = op.Cast(cu_seqlens, to=TensorProto.INT64)
    starts, ends = op.Slice(cu, v0, last), op.Slice(cu, v1, far)
    wanted = op.Max(op.Cast(counts, to=TensorProto.INT64), zero)
    kept = op.Min(op.CumSum(op.Min(wanted, op.Sub(ends, starts)), zero), rows)
    cu_keep = op.Concat(v0, kept, axis=0)

    # The sequence of each token: how many ends lie at or before it. Tokens past the last end get the batch.
    marks = op.Expand(zero, op.Add(total, v1))
    one_each = op.Expand(v1, op.Shape(ends))
    marked = op.ScatterND(marks, op.Unsqueeze(ends, v1), one_each, reduction="add")
    owner = op.Slice(op.CumSum(marked, zero), v0, total)

    broken = op.IsNaN(scores)
    comparable = op.Add(op.Where(broken, hidden, scores), op.Constant(value_float=0.0))  # -0 becomes 0
    if op.Greater(op.Size(protected), zero):
        common = op.Cast(op.Not(protected), to=TensorProto.INT64)
    else:
        common = op.Expand(op.Constant(value_int=1), total)
    flags = op.Add(
        op.Add(op.Mul(owner, op.Constant(value_int=4)), op.Mul(common, op.Constant(value_int=2))),
        op.Cast(broken, to=TensorProto.INT64),
    )
    _, by_score = op.TopK(comparable, total, axis=0, largest=1, sorted=1)  # ties: the lower index first
    _, by_flag = op.TopK(op.Gather(flags, by_score), total, axis=0, largest=0, sorted=1)
    best_first = op.Gather(by_score, by_flag)

    # A token stays when its place among its sequence's, best first, is below the number kept.
    number = op.Concat(op.Sub(kept, op.Slice(cu_keep, v0, last)), v0, axis=0)
    owner_sorted = op.Gather(owner, best_first)
    place = op.Sub(op.Range(zero, op.Squeeze(total), op.Constant(value_int=1)), op.Gather(cu, owner_sorted))
    stays_sorted = op.Cast(op.Less(place, op.Gather(number, owner_sorted)), to=TensorProto.INT64)
    stays = op.ScatterElements(op.Expand(zero, total), best_first, stays_sorted, axis=0)
    target = op.Sub(op.CumSum(stays, zero), v1)
    is_kept = op.Cast(stays, to=TensorProto.BOOL)
    assignment = op.Where(is_kept, target, last)
    # Tokens that go are written to a place behind the others, which is cut off.
    nobody = op.Expand(last, op.Add(rows, v1))
    token = op.Range(zero, op.Squeeze(total), op.Constant(value_int=1))
    index = op.ScatterND(nobody, op.Unsqueeze(op.Where(is_kept, target, rows), v1), token)
    return (
        op.Cast(op.Slice(index, v0, rows), to=TensorProto.INT32),
        op.Cast(cu_keep, to=TensorProto.INT32),
        op.Cast(assignment, to=TensorProto.INT32),
    )


NODE = node(Select)


def translate_select(scores, cu_seqlens, counts, protected, x, capacity):
    """``pruning_select``: the node, and the kept rows of x by :func:`translate_gather`."""
    size = op.Constant(value_int=capacity) if isinstance(capacity, int) else op.Cast(capacity, to=TensorProto.INT64)
    keep_index, cu_keep, assignment = NODE(scores, cu_seqlens, counts, size, given(protected, NONE_PROTECTED))
    rows = op.Constant(value_floats=[0.0]) if x is None else translate_gather(x, keep_index, None)
    return keep_index, cu_keep, assignment, rows


def translate_gather(x, index, coefficient):
    """``pruning_gather``: a row of zeros behind the data stands for the index -1."""
    v0, v1 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    rows = op.Shape(x, start=0, end=1)
    blank = op.CastLike(op.Expand(op.Constant(value_float=0.0), op.Concat(v1, op.Shape(x, start=1, end=2), axis=0)), x)
    wide = op.Cast(index, to=TensorProto.INT64)
    taken = op.Gather(op.Concat(x, blank, axis=0), op.Where(op.Less(wide, v0), rows, wide))
    if coefficient is None:
        return taken
    scaled = op.Mul(op.Cast(taken, to=TensorProto.FLOAT), op.Unsqueeze(coefficient, v1))
    present = op.Unsqueeze(op.GreaterOrEqual(wide, v0), v1)
    return op.CastLike(op.Where(present, scaled, op.Constant(value_float=0.0)), x)


def translate_merge(x, assignment, coefficient, rows):
    """``pruning_merge``: sums into rows; what is assigned to -1 goes to a row behind them, which is cut off."""
    v0, v1 = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    count = (
        op.Constant(value_ints=[rows]) if isinstance(rows, int) else op.Reshape(op.Cast(rows, to=TensorProto.INT64), v1)
    )
    values = op.Cast(x, to=TensorProto.FLOAT)
    if coefficient is not None:
        values = op.Mul(values, op.Unsqueeze(coefficient, v1))
    wide = op.Cast(assignment, to=TensorProto.INT64)
    target = op.Unsqueeze(op.Where(op.Less(wide, v0), count, wide), v1)
    shape = op.Concat(op.Add(count, v1), op.Shape(x, start=1, end=2), axis=0)
    total = op.ScatterND(op.Expand(op.Constant(value_float=0.0), shape), target, values, reduction="add")
    return op.CastLike(op.Slice(total, v0, count, v0), x)


TRANSLATIONS = {
    f"pruning_{name}_{backend}": translate
    for name, translate in (("select", translate_select), ("gather", translate_gather), ("merge", translate_merge))
    for backend in ("cpu", "triton")
}


def bodies():
    """Portable bodies by node name and form."""
    return {"Select": {"loop": Select}}
