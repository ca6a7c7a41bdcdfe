"""How late interaction appears in an ONNX graph: standard operators, over the (tokens, tokens) similarities.

Set sizes stay dynamic: best matches per set are scattered maxima, sums over a set's tokens scattered sums.
"""
# mypy: ignore-errors

from onnx import TensorProto, helper
from onnxscript import opset18 as op

LOWEST = helper.make_tensor("lowest", TensorProto.FLOAT, [1], [float("-inf")])


def _owner(offsets, tokens):
    """(tokens,) the set of each token; tokens past the last offset get the number of sets."""
    ends = op.Cast(
        op.Slice(offsets, op.Constant(value_ints=[1]), op.Constant(value_ints=[2**31])), to=TensorProto.INT64
    )
    place = op.Unsqueeze(
        op.Range(op.Constant(value_int=0), op.Squeeze(tokens), op.Constant(value_int=1)), op.Constant(value_ints=[1])
    )
    passed = op.Cast(op.GreaterOrEqual(place, ends), to=TensorProto.INT64)
    return op.ReduceSum(passed, op.Constant(value_ints=[1]), keepdims=0)


def _sums(similarity, owner_rows, owner_columns, sets_rows, sets_columns):
    """(row sets, column sets): each row's best match in each column set, summed over the row's set."""
    v1 = op.Constant(value_ints=[1])
    zero = op.Constant(value_floats=[0.0])
    rows = op.Shape(similarity, start=0, end=1)
    more_rows, more_columns = op.Add(sets_rows, v1), op.Add(sets_columns, v1)
    start = op.Expand(op.Constant(value=LOWEST), op.Concat(rows, more_columns, axis=0))
    index = op.Expand(op.Unsqueeze(owner_columns, op.Constant(value_ints=[0])), op.Shape(similarity))
    best = op.ScatterElements(start, index, similarity, axis=1, reduction="max")
    found = op.Where(op.Equal(best, op.Constant(value=LOWEST)), zero, best)  # an empty set matches with 0
    total = op.ScatterND(
        op.Expand(zero, op.Concat(more_rows, more_columns, axis=0)),
        op.Unsqueeze(owner_rows, v1),
        found,
        reduction="add",
    )
    axes = op.Constant(value_ints=[0, 1])
    return op.Slice(total, op.Constant(value_ints=[0, 0]), op.Concat(sets_rows, sets_columns, axis=0), axes)


def translate(a, b, cu_a, cu_b, from_a, from_b):
    """``maxsim``; the places of the best matches, which only a backward pass reads, are left empty."""
    a, b = op.Cast(a, to=TensorProto.FLOAT), op.Cast(b, to=TensorProto.FLOAT)
    v1 = op.Constant(value_ints=[1])
    sets_a, sets_b = op.Sub(op.Shape(cu_a), v1), op.Sub(op.Shape(cu_b), v1)
    owner_a, owner_b = _owner(cu_a, op.Shape(a, start=0, end=1)), _owner(cu_b, op.Shape(b, start=0, end=1))
    similarity = op.MatMul(a, op.Transpose(b, perm=[1, 0]))
    empty = op.Expand(op.Constant(value_floats=[0.0]), op.Concat(op.Constant(value_ints=[0]), sets_b, axis=0))
    sum_a = _sums(similarity, owner_a, owner_b, sets_a, sets_b) if from_a else empty
    turned = op.Transpose(similarity, perm=[1, 0])
    sum_b = op.Transpose(_sums(turned, owner_b, owner_a, sets_b, sets_a), perm=[1, 0]) if from_b else empty
    places = op.Cast(empty, to=TensorProto.INT32)
    return sum_a, sum_b, places, places


TRANSLATIONS = {"maxsim_cpu": translate}


def bodies():
    """No node of its own."""
    return {}
