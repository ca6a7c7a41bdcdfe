"""Translations of torch operators that the exporter has none for, and that our modules use."""
# mypy: ignore-errors

from __future__ import annotations

import torch
from onnx import TensorProto
from onnxscript import opset18 as op


def searchsorted(sorted_sequence, values, out_int32=False, right=False, side=None, sorter=None):
    """How many entries of a 1-D sorted sequence lie before (``right``: at or before) each value."""
    if sorter is not None:
        raise ValueError("searchsorted with a sorter cannot be exported")
    last = op.Constant(value_ints=[-1])
    column = op.Unsqueeze(values, last)
    sequence = op.CastLike(sorted_sequence, values)
    before = op.LessOrEqual(sequence, column) if right or side == "right" else op.Less(sequence, column)
    kind = TensorProto.INT32 if out_int32 else TensorProto.INT64
    return op.ReduceSum(op.Cast(before, to=kind), last, keepdims=0)


TRANSLATIONS = {torch.ops.aten.searchsorted.Tensor: searchsorted}
