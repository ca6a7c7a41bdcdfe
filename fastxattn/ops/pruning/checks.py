"""Validation of pruning arguments; contents are looked at where that costs no device synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.ops.checks import check_offsets, readable


def check_scores(scores: Tensor, cu_seqlens: Tensor) -> None:
    """``scores`` (total,) floating point, on the device of ``cu_seqlens``."""
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        raise TypeError(
            f"scores must be a floating-point tensor; got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (total,); got {tuple(scores.shape)}")
    check_offsets("cu_seqlens", cu_seqlens, scores.shape[0])
    check_device("cu_seqlens", cu_seqlens, "scores", scores)


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor) -> None:
    """``max_seqlen`` is a bound on the lengths: sizes of results are derived from it."""
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen must be an int or None; got {type(max_seqlen).__name__}")
    if readable(cu_seqlens) and cu_seqlens.shape[0] > 1 and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest sequence, {longest}; got {max_seqlen}")


def check_per_token(name: str, t: Tensor, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
    """``t`` (total,): one value per token on the device of ``tokens``, of ``dtype`` or (None) floating point."""
    if dtype is None and isinstance(t, Tensor) and t.dtype.is_floating_point:
        dtype = t.dtype
    if dtype is None:
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(t, 'dtype', type(t).__name__)}")
    check_vector(name, t, tokens.shape[0], dtype)
    check_device(name, t, "tokens", tokens)


def check_rows(name: str, x: Tensor, rows: int | None = None) -> None:
    """``x`` (rows, ...) floating point."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 1 or (rows is not None and x.shape[0] != rows):
        raise ValueError(f"{name} must have {rows} rows (axis 0); got shape {tuple(x.shape)}")


def check_vector(name: str, t: Tensor, length: int, dtype: torch.dtype) -> None:
    """``t`` of shape (length,) and the given dtype."""
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype}; got {getattr(t, 'dtype', type(t).__name__)}")
    if tuple(t.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},); got {tuple(t.shape)}")


def check_index(name: str, index: Tensor, rows: int) -> None:
    """``index`` (n,) int32, every entry in [-1, rows)."""
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor; got {getattr(index, 'dtype', type(index).__name__)}")
    if index.ndim != 1:
        raise ValueError(f"{name} must have one axis; got shape {tuple(index.shape)}")
    if readable(index) and index.numel():
        low, high = (int(v) for v in torch.aminmax(index))
        if low < -1 or high >= rows:
            raise ValueError(f"{name} must lie in [-1, {rows}); got values from {low} to {high}")


def check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors on one device."""
    if t.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {t.device}")
