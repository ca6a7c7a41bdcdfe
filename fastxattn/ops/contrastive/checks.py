"""Validation of contrastive losses: a message names the argument, the rule and the value got."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Pair = tuple[torch.Tensor, torch.Tensor]


def features(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Check a (rows, D) feature matrix; ``like`` gives dtype, device and D."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, features); got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if like is not None:
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have dtype {like.dtype} as the other side; got {x.dtype}")
        if x.device != like.device:
            raise ValueError(f"{name} must be on {like.device} as the other side; got {x.device}")
        if x.shape[1] != like.shape[1]:
            raise ValueError(f"{name} must have {like.shape[1]} features as the other side; got {x.shape[1]}")
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def one_element(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``value`` as a tensor without dimensions on ``device``: float32, or float64 when it was given so."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element; got shape {tuple(value.shape)}")
        value = value.reshape(())
        return value.to(device=device, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor of one element; got {type(value).__name__}")
    return torch.full((), float(value), dtype=torch.float32, device=device)


def integers(name: str, x: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """Check an integer vector of ``rows`` entries."""
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},); got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}; got {x.device}")
    return x.contiguous()


def both_sides(name: str, value: Sequence[torch.Tensor] | torch.Tensor, n: int, m: int, device: torch.device) -> Pair:
    """A pair of integer vectors, or one for both sides when these are equally long."""
    if isinstance(value, torch.Tensor):
        if n != m:
            raise ValueError(f"{name} must be a pair of tensors when a and b differ in rows; got one tensor")
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair of tensors; got {len(value)}")
    return integers(f"{name}[0]", value[0], n, device), integers(f"{name}[1]", value[1], m, device)


def targets_in_range(targets: torch.Tensor, m: int) -> None:
    """Refuse targets outside [-1, M); on a GPU kernels clamp instead, so that nothing waits for the device."""
    if targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = targets.aminmax()
    if low < -1 or high >= m:
        raise ValueError(f"targets must lie in [-1, {m}); got values from {int(low)} to {int(high)}")


def row_weights(
    weights: torch.Tensor | Sequence[torch.Tensor] | None, counts: Sequence[int]
) -> list[torch.Tensor | None]:
    """Weights of each direction's rows: one tensor for all directions, or one each."""
    if weights is None:
        return [None] * len(counts)
    each = [weights] * len(counts) if isinstance(weights, torch.Tensor) else list(weights)
    if len(each) != len(counts):
        raise ValueError(f"weights must be one tensor or {len(counts)}; got {len(each)}")
    for w, n in zip(each, counts, strict=True):
        if w.shape != (n,) or not w.is_floating_point():
            raise ValueError(f"weights must be a floating-point tensor of shape ({n},); got {tuple(w.shape)} {w.dtype}")
    return list(each)


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
