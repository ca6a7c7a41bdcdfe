"""How retrieval appears in an ONNX graph: a product and the standard TopK, which keeps the first of equal scores."""
# mypy: ignore-errors

from onnx import TensorProto, helper
from onnxscript import opset18 as op

LOWEST = helper.make_tensor("lowest", TensorProto.FLOAT, [], [float("-inf")])


def translate(queries, corpus, factor, k, first):
    """``topk_similarity``: where the corpus has fewer than k rows, -inf and -1."""
    scores = op.MatMul(
        op.Cast(queries, to=TensorProto.FLOAT), op.Transpose(op.Cast(corpus, to=TensorProto.FLOAT), perm=[1, 0])
    )
    if factor is not None:
        scores = op.Mul(scores, factor)
    # k columns that no row can reach make up for a small corpus.
    pads = op.Constant(value_ints=[0, 0, 0, k])
    padded = op.Pad(scores, pads, op.Constant(value=LOWEST))
    best, index = op.TopK(padded, op.Constant(value_ints=[k]), axis=1, largest=1, sorted=1)
    rows = op.Shape(scores, start=1, end=2)
    shifted = op.Add(index, op.Constant(value_int=first))
    return best, op.Where(op.Less(index, rows), shifted, op.Constant(value_int=-1))


TRANSLATIONS = {"topk_similarity_cpu": translate}


def bodies():
    """No node of its own."""
    return {}
