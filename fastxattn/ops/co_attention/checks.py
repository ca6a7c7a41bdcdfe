"""Validation of co-attention, by the names that the caller's arguments have."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.checks import (
    check_contents,
    check_floats,
    check_int32,
    check_key_bias,
    check_numbers,
    check_tensor,
    check_value,
    check_wide,
    readable,
)
from fastxattn.ops.co_attention.problem import SIDES, Problem

_ROWS = tuple(f"{what}_{side}" for what in ("query", "value") for side in SIDES)


def check_sides(problem: Problem) -> None:
    """Raise TypeError or ValueError when queries and values do not fit together; for traced calls, too."""
    query = problem.query_a
    for name in _ROWS:
        t = getattr(problem, name)
        check_tensor(name, t)
        if t.ndim != 3:
            raise ValueError(f"{name} must have shape (tokens, heads, dim); got {tuple(t.shape)}")
        if t.shape[1] != query.shape[1]:
            raise ValueError(f"{name} must have the heads of query_a, {query.shape[1]}; got {t.shape[1]}")
    dim, other = problem.query_a.shape[2], problem.query_b.shape[2]
    if other != dim:
        raise ValueError(f"query_b must have the head_dim of query_a, {dim}; got {other}")
    for side in SIDES:
        rows, values = (getattr(problem, f"{what}_{side}").shape[0] for what in ("query", "value"))
        if values != rows:
            raise ValueError(f"value_{side} must have as many tokens as query_{side}, {rows}; got {values}")


def check_shapes(problem: Problem) -> None:
    """Types, dtypes, shapes, devices and numbers.

    Raises:
        TypeError: something is not a tensor or a number, or has the wrong dtype.
        ValueError: a shape, device or number is wrong.
    """
    check_sides(problem)
    query = problem.query_a
    heads = query.shape[1]
    for name in _ROWS:
        t = getattr(problem, name)
        check_tensor(name, t, query, "query_a")
        check_floats(name, t, query, "query_a")
        shape = tuple(t.shape)
        check_value(t.shape[1] >= 1 and t.shape[2] >= 1, f"{name} must have at least 1 head and 1 channel; got {shape}")
    for side in SIDES:
        name, bias_name = f"cu_seqlens_{side}", f"key_bias_{side}"
        t, bias = getattr(problem, name), getattr(problem, bias_name)
        check_tensor(name, t, query, "query_a")
        check_int32(name, t)
        if t.ndim != 1:
            raise ValueError(f"{name} must have shape (batch + 1,); got {tuple(t.shape)}")
        check_value(t.shape[0] >= 1, f"{name} must have shape (batch + 1,), at least one offset; got none")
        if bias is not None:
            check_tensor(bias_name, bias, query, "query_a")
            check_wide(bias_name, bias, query, "query_a")
            check_key_bias(bias_name, bias, getattr(problem, f"query_{side}").shape[0], heads)
    count, got = problem.cu_seqlens_a.shape[0], problem.cu_seqlens_b.shape[0]
    check_value(got == count, f"cu_seqlens_b must have as many offsets as cu_seqlens_a, {count}; got {got}")
    check_numbers(problem)
    if problem.dropout_p and problem.dropout_seed is not None:
        check_tensor("dropout_seed", problem.dropout_seed, query, "query_a")


def check(problem: Problem) -> None:
    """:func:`check_shapes`, and the contents of offsets where reading them does not wait for a device."""
    check_shapes(problem)
    if readable(problem.cu_seqlens_a):
        for side in SIDES:
            name, rows = f"cu_seqlens_{side}", getattr(problem, f"query_{side}").shape[0]
            check_contents(name, getattr(problem, name), rows, "tokens")


def check_seed(seed: object, query_a: object) -> None:
    """Refuse what is no int and no int64 tensor of one number; and a query that no seed can be drawn for."""
    check_tensor("query_a", query_a)
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool)):
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int or an int64 tensor; got {got}")
    check_value(seed.numel() == 1, f"dropout_seed must hold one number; got shape {tuple(seed.shape)}")
