"""Checks that operations share, one wording per rule; the caller gives the arguments' names."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.arguments import Arguments
from fastxattn.ops.numbers import check_within
from fastxattn.ops.offsets import check_dense

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_value(ok: bool | torch.SymBool, message: str) -> None:
    """ValueError unless ``ok``; on an unbacked symbolic size, a check when the graph runs."""
    torch._check_value(ok, lambda: message)


def check_tensor(name: str, t: object, like: Tensor, like_name: str = "query") -> None:
    """Refuse what is no dense tensor on the device of ``like``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    check_dense(name, t)
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {t.device}")


def check_floats(name: str, t: Tensor, like: Tensor, like_name: str = "query") -> None:
    """Refuse dtypes that are not floating point or not that of ``like``."""
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {t.dtype}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}; got {t.dtype}")


def check_wide(name: str, t: Tensor, query: Tensor, query_name: str = "query") -> None:
    """Refuse biases and statistics that are not in the dtype of the scores: float32, float64 beside float64."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if t.dtype != wide:
        raise TypeError(f"{name} must be {wide} beside a {query.dtype} {query_name}; got {t.dtype}")


def check_numbers(problem: Arguments) -> None:
    """Refuse numbers outside the limits of their fields."""
    for name, (low, below) in problem.limits.items():
        check_within(name, getattr(problem, name), low, below)


def check_int32(name: str, t: Tensor) -> None:
    """Refuse dtypes other than int32."""
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {t.dtype}")


def check_key_bias(name: str, t: Tensor, rows: int, heads: int) -> None:
    """Refuse shapes other than (rows,) and (rows, heads)."""
    if t.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (key tokens,) or (key tokens, heads); got {tuple(t.shape)}")
    shape = tuple(t.shape)
    check_value(t.shape[0] == rows, f"{name} must have one row per key token, {rows}; got {shape}")
    if t.ndim == 2:
        check_value(t.shape[1] == heads, f"{name} must have one column per query head, {heads}; got {shape}")
