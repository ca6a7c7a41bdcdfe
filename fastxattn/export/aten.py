"""Translations of torch operators that the modules use and torch's exporter lacks or writes so that they overflow.

torch's own write logaddexp as log(exp + exp) and log-sigmoid as log(sigmoid): infinite or wrong for large arguments.
ONNX Runtime's ReduceLogSumExp and Sigmoid lose digits too; Softplus does not.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
from onnx import TensorProto
from onnxscript import opset18 as op


def searchsorted(sorted_sequence, values, out_int32=False, right=False, side=None, sorter=None):
    """How many entries of a sorted sequence lie before (``right``: at or before) each value; NaN lies behind all.

    The sequence is 1-D, or one for each row of values.
    """
    if sorter is not None:
        raise ValueError("searchsorted with a sorter cannot be exported")
    last = op.Constant(value_ints=[-1])
    column = op.Unsqueeze(values, last)
    rows = (
        sorted_sequence
        if len(sorted_sequence.shape) == 1
        else op.Unsqueeze(sorted_sequence, op.Constant(value_ints=[-2]))
    )
    behind = op.Greater if right or side == "right" else op.GreaterOrEqual
    before = op.Not(behind(rows, column))
    kind = TensorProto.INT32 if out_int32 else TensorProto.INT64
    return op.ReduceSum(op.Cast(before, to=kind), last, keepdims=0)


def cross_entropy(self, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    """Classes or probabilities as targets; torch's exporter drops ``label_smoothing`` and probabilities."""
    rank = len(self.shape)
    axis = 1 if rank > 1 else 0
    axes = op.Constant(value_ints=[axis])
    logp = op.LogSoftmax(self, axis=axis)
    zero, one = (op.CastLike(op.Constant(value_float=x), self) for x in (0.0, 1.0))
    factor = None if weight is None else op.Reshape(weight, op.Constant(value_ints=[-1] + [1] * (rank - 1 - axis)))
    weighted = logp if factor is None else op.Mul(logp, factor)
    if target.dtype.is_floating_point():
        classes = op.CastLike(op.Shape(self, start=axis, end=axis + 1), self)
        even = op.Div(op.CastLike(op.Constant(value_float=float(label_smoothing)), self), classes)
        keep = op.CastLike(op.Constant(value_float=1.0 - label_smoothing), self)
        loss = op.Neg(op.ReduceSum(op.Mul(weighted, op.Add(op.Mul(target, keep), even)), axes, keepdims=0))
        counted = op.Expand(one, op.Shape(loss))
    else:
        valid = op.Not(op.Equal(target, op.CastLike(op.Constant(value_int=ignore_index), target)))
        label = op.Unsqueeze(op.Where(valid, target, op.CastLike(op.Constant(value_int=0), target)), axes)
        picked = op.Neg(op.Squeeze(op.GatherElements(weighted, label, axis=axis), axes))
        if label_smoothing:
            classes = op.CastLike(op.Shape(self, start=axis, end=axis + 1), self)
            even = op.Div(op.CastLike(op.Constant(value_float=float(label_smoothing)), self), classes)
            keep = op.CastLike(op.Constant(value_float=1.0 - label_smoothing), self)
            picked = op.Sub(op.Mul(picked, keep), op.Mul(op.ReduceSum(weighted, axes, keepdims=0), even))
        loss = op.Where(valid, picked, zero)
        each = one if weight is None else op.Gather(weight, op.Squeeze(label, axes))
        counted = op.Where(valid, each, zero)
    if reduction == 0:
        return loss
    total = op.ReduceSum(loss, keepdims=0)
    return total if reduction == 2 else op.Div(total, op.ReduceSum(counted, keepdims=0))


def log_sigmoid(self):
    """-softplus(-x)."""
    return op.Neg(op.Softplus(op.Neg(self)))


def log_sigmoid_forward(self):
    """The same, beside the buffer that only a backward pass reads."""
    result = log_sigmoid(self)
    return result, result


def logaddexp(self, other):
    """max + softplus(-|difference|); an infinite maximum is the result."""
    top = op.Max(self, other)
    gap = op.Abs(op.Sub(self, other))
    finite = op.Equal(op.Sub(top, top), op.CastLike(op.Constant(value_float=0.0), top))
    return op.Where(finite, op.Add(top, op.Softplus(op.Neg(gap))), top)


def logsumexp(self, dim, keepdim=False):
    """Shifted by the maximum, where that is finite."""
    axes = op.Constant(value_ints=list(dim) if isinstance(dim, (list, tuple)) else [dim])
    zero = op.CastLike(op.Constant(value_float=0.0), self)
    top = op.ReduceMax(self, axes, keepdims=1)
    base = op.Where(op.Equal(op.Sub(top, top), zero), top, zero)
    total = op.ReduceSum(op.Exp(op.Sub(self, base)), axes, keepdims=1)
    result = op.Add(op.Log(total), base)
    return result if keepdim else op.Squeeze(result, axes)


def sort_stable(self, stable=True, dim=-1, descending=False):
    """TopK of everything: the first of equal values comes first, either way. NaN is not ranked as torch does."""
    size = op.Shape(self, start=dim, end=None if dim == -1 else dim + 1)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def repeat_interleave(self, repeats, dim=None, output_size=None):
    """Each entry along ``dim`` a number of times; onnxscript's own repeats another axis when the number is open."""
    rank = len(self.shape) if dim is not None else 1
    if dim is None:
        self, dim = op.Reshape(self, op.Constant(value_ints=[-1])), 0
    dim %= rank
    axis, one = op.Constant(value_ints=[dim + 1]), op.Constant(value_ints=[1])
    count = op.Constant(value_ints=[repeats]) if isinstance(repeats, int) else op.Reshape(repeats, one)
    parts = [op.Constant(value_ints=[1] * (dim + 1)), count]
    if dim + 1 < rank:
        parts.append(op.Constant(value_ints=[1] * (rank - dim - 1)))
    wide = op.Expand(op.Unsqueeze(self, axis), op.Concat(*parts, axis=0))
    sizes = [op.Mul(op.Shape(self, start=dim, end=dim + 1), count)]
    if dim:
        sizes.insert(0, op.Shape(self, start=0, end=dim))
    if dim + 1 < rank:
        sizes.append(op.Shape(self, start=dim + 1))
    return op.Reshape(wide, op.Concat(*sizes, axis=0), allowzero=1)


TRANSLATIONS = {
    torch.ops.aten.repeat_interleave.self_int: repeat_interleave,
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    torch.ops.aten.cross_entropy_loss.default: cross_entropy,
    torch.ops.aten.log_sigmoid.default: log_sigmoid,
    torch.ops.aten.log_sigmoid_forward.default: log_sigmoid_forward,
    torch.ops.aten.logaddexp.default: logaddexp,
    torch.ops.aten.logsumexp.default: logsumexp,
}
