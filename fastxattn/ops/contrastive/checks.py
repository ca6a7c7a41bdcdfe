"""Validation of contrastive losses: a message names the argument, the rule and the value got.

One rule of dtypes holds for all losses, on one process and on many. Under autocast features (both sides, queues, hard
negatives, a teacher's, tokens) of float16, bfloat16 and float32 take autocast's dtype, and float64 stays float64, as in
:func:`torch.mm` (:func:`fastxattn.runtime.autocast.cast`). The dtype of the features decides what a loss is computed
in: float32, or float64 for float64; :func:`one_element` gives scales and biases that dtype, and autocast rounds nothing
inside the loss.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch

from fastxattn.ops.checks import check_number, check_tensor, readable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Pair = tuple[torch.Tensor, torch.Tensor]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a loss of features of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that is not where the features are."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as the features; got {x.device}")


def features(name: str, x: torch.Tensor, like: torch.Tensor | None = None, dims: int = 2) -> torch.Tensor:
    """Check a (rows, D) feature matrix, or (rows, K, D) with ``dims`` 3; ``like`` gives dtype, device and D."""
    check_tensor(name, x)
    if x.dim() != dims:
        raise ValueError(f"{name} must have shape (rows, {'K, ' if dims == 3 else ''}features); got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if like is not None:
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have dtype {like.dtype} as the other side; got {x.dtype}")
        same_device(name, x, like.device)
        if x.shape[-1] != like.shape[-1]:
            raise ValueError(f"{name} must have {like.shape[-1]} features as the other side; got {x.shape[-1]}")
    return x if dims > 2 or (x.stride(1) == 1 and x.stride(0) >= x.shape[1]) else x.contiguous()


def one_element(
    name: str, value: float | torch.Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``value``, a finite number or a tensor of one element, without dimensions on ``device`` and in ``dtype``.

    Args:
        name: of the argument.
        value: a number of Python or NumPy; or a tensor of any floating or integer dtype, whose gradient comes in its
            own. A tensor on the CPU is moved to ``device``.
        device: of the features.
        dtype: that the loss is computed in, see :func:`computed_in`: a float64 scale of float32 features is rounded.
    """
    if type(value).__module__ == "numpy" and not isinstance(value, numbers.Real):
        value = torch.as_tensor(value)  # an array; to a compiler NumPy's numbers are arrays too
    if not isinstance(value, torch.Tensor):
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number or a tensor of one element; got {type(value).__name__}")
        return torch.full((), check_number(name, value), dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element; got shape {tuple(value.shape)}")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of one; got {value.dtype}")
    if value.device.type != "cpu":
        same_device(name, value, device)
    return value.reshape(()).to(device=device, dtype=dtype)


def integers(name: str, x: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """Check an integer vector of ``rows`` entries."""
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},); got {tuple(x.shape)}")
    same_device(name, x, device)
    return x.contiguous()


def both_sides(name: str, value: Sequence[torch.Tensor] | torch.Tensor, n: int, m: int, device: torch.device) -> Pair:
    """A pair of integer vectors, or one for both sides when these are equally long."""
    if isinstance(value, torch.Tensor):
        if n != m:
            raise ValueError(f"{name} must be a pair of tensors when the sides differ in rows; got one tensor")
        shared = integers(name, value, n, device)
        return shared, shared
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
        raise ValueError(f"{name} must be a tensor or a pair of tensors; got {got}")
    return integers(f"{name}[0]", value[0], n, device), integers(f"{name}[1]", value[1], m, device)


def hard_negatives(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Check the (N, K, D) further negatives of the rows of ``a``."""
    x = features("hard_negatives", x, a, dims=3)
    if x.shape[0] != a.shape[0]:
        raise ValueError(f"hard_negatives must have shape ({a.shape[0]}, K, {a.shape[1]}); got {tuple(x.shape)}")
    return x


def targets_in_range(targets: torch.Tensor, m: int) -> None:
    """Refuse targets outside [-1, M); on a GPU kernels clamp instead, so that nothing waits for the device."""
    if targets.numel() == 0 or not readable(targets):
        return
    low, high = targets.aminmax()
    if low < -1 or high >= m:
        raise ValueError(f"targets must lie in [-1, {m}); got values from {int(low)} to {int(high)}")


def row_weights(
    weights: torch.Tensor | Sequence[torch.Tensor] | None, counts: Sequence[int], like: torch.Tensor
) -> list[torch.Tensor | None]:
    """Weights of each direction's rows, one tensor for all directions or one each, in the dtype of the loss.

    Negative weights are weights like others; NaN and infinity are refused where they may be read.
    """
    if weights is None:
        return [None] * len(counts)
    each = [weights] * len(counts) if isinstance(weights, torch.Tensor) else list(weights)
    if len(each) != len(counts):
        raise ValueError(f"weights must be one tensor or {len(counts)}; got {len(each)}")
    for w, n in zip(each, counts, strict=True):
        if not isinstance(w, torch.Tensor):
            raise TypeError(f"weights must be one tensor or {len(counts)}; got {type(w).__name__} inside")
        if w.shape != (n,) or not w.is_floating_point():
            raise ValueError(f"weights must be a floating-point tensor of shape ({n},); got {tuple(w.shape)} {w.dtype}")
        same_device("weights", w, like.device)
        if readable(w) and not bool(w.detach().isfinite().all()):
            raise ValueError(f"weights must be finite; got {w.detach()[~w.detach().isfinite()][0].item()}")
    return [w.to(computed_in(like.dtype)) for w in each]


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
