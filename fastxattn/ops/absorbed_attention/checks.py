"""Validation of absorbed attention; for traced calls, too."""

from __future__ import annotations

from torch import Tensor

from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.ops.checks import (
    check_floats,
    check_int32,
    check_key_bias,
    check_numbers,
    check_offsets,
    check_tensor,
    check_wide,
    readable,
)


def check(problem: Problem, key_index: Tensor | None = None) -> None:
    """Refuse arguments that do not fit together; contents are read where that does not wait for a device.

    Raises:
        TypeError: something is not a tensor or a number, or has the wrong dtype.
        ValueError: a shape, device, number, offset or index is wrong.
    """
    query, context = problem.query, problem.context
    check_numbers(problem)
    for name, t in (("query", query), ("context", context)):
        check_tensor(name, t)
    if query.ndim != 3:
        raise ValueError(f"query must be (total_q, heads, width); got shape {tuple(query.shape)}")
    if context.ndim != 2:
        raise ValueError(f"context must be (total_k, width); got shape {tuple(context.shape)}")
    if query.shape[2] != context.shape[1]:
        raise ValueError(f"query must be as wide as context, {context.shape[1]}; got {query.shape[2]}")
    if query.shape[1] < 1 or query.shape[2] < 1:
        raise ValueError(f"query must have at least one head and one feature; got shape {tuple(query.shape)}")
    for name, t in (("query", query), ("context", context)):
        check_tensor(name, t, query)
        check_floats(name, t, query)
    if key_index is not None:
        _check_index(key_index, context)
    slots = context.shape[0] if key_index is None else key_index.shape[0]
    for name, rows in (("cu_seqlens_q", query.shape[0]), ("cu_seqlens_k", slots)):
        offsets = getattr(problem, name)
        check_tensor(name, offsets, query)
        check_offsets(name, offsets, rows)
    batch, got = problem.cu_seqlens_q.shape[0], problem.cu_seqlens_k.shape[0]
    if got != batch:
        raise ValueError(f"cu_seqlens_k must have as many offsets as cu_seqlens_q, {batch}; got {got}")
    ranges, key_bias = problem.kv_range, problem.key_bias
    if ranges is not None:
        check_tensor("kv_range", ranges, query)
        check_int32("kv_range", ranges)
        if ranges.shape != (query.shape[0], 2):
            raise ValueError(f"kv_range must have shape {(query.shape[0], 2)}; got {tuple(ranges.shape)}")
    if key_bias is not None:
        check_tensor("key_bias", key_bias, query)
        if not key_bias.is_floating_point():  # a mask, say; other floating-point dtypes are converted
            check_wide("key_bias", key_bias, query)
        check_key_bias("key_bias", key_bias, context.shape[0], query.shape[1])


def _check_index(index: Tensor, context: Tensor) -> None:
    check_tensor("key_index", index, context, "context")
    check_int32("key_index", index)
    if index.ndim != 1:
        raise ValueError(f"key_index must have shape (kept,); got {tuple(index.shape)}")
    if readable(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= context.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"key_index must lie between 0 and {context.shape[0] - 1}; got {wrong}")
