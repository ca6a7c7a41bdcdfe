"""Checks that operations share, one wording per rule: tensors, numbers, offsets; the caller gives the names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.arguments import LARGEST, Arguments
from fastxattn.runtime import env

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARE = "lie in [0, 1)", lambda share: 0 <= share < 1
"""The rule of :func:`check_number` for a share of something, less than all of it."""
POSITIVE = "be positive and finite", lambda x: 0 < x < math.inf


def check_value(ok: bool | torch.SymBool, message: str) -> None:
    """ValueError unless ``ok``; on an unbacked symbolic size, a check when the graph runs."""
    torch._check_value(ok, lambda: message)


def check_tensor(name: str, t: object, like: Tensor | None = None, like_name: str = "query") -> Tensor:
    """Refuse what is no dense tensor, and one that is not on the device of ``like``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if t.layout != torch.strided:  # sparse, mkldnn and jagged tensors, which no kernel reads
        raise TypeError(f"{name} must be a dense tensor; got one of {t.layout}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {t.device}")
    return t


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


def check_mask(name: str, mask: object, tokens: Tensor) -> Tensor:
    """Refuse what is no boolean (batch, length) mask of padded ``tokens``."""
    mask = check_tensor(name, mask)
    shape = tuple(tokens.shape[:2])
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, True = valid token; got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape (batch, length), {shape}; got {tuple(mask.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"{name} must be on the device of its tokens, {tokens.device}; got {mask.device}")
    return mask


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


def float_of(number: Any) -> float:
    """As ``float``; infinite where that overflows."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def finite(x: float) -> bool:
    """Whether a number is finite in float32; :func:`math.isfinite` takes no symbolic number of a compiler."""
    return -LARGEST <= x <= LARGEST


def check_number(name: str, value: object, rule: str = "be finite", accepts: Callable[[float], bool] = finite) -> float:
    """Check a number of Python or NumPy, which must ``rule``; a bool is none."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]  # of a traced program: nothing to compare
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not accepts(float_of(value)):
        raise ValueError(f"{name} must {rule}; got {value}")
    return float(value)


def check_within(name: str, value: object, low: float = -math.inf, below: float = math.inf) -> None:
    """Refuse what is no finite number in [low, below); a tensor too, for it would get no gradient."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not isinstance(value, numbers.Real):
        return  # symbolic, of a traced program
    x = float_of(value)
    if not max(low, -LARGEST) <= x <= LARGEST:
        overflows = " (infinite in float32)" if LARGEST < abs(x) < math.inf else ""
        raise ValueError(f"{name} must be finite{'' if low < 0 else ' and at least 0'}; got {x}{overflows}")
    if x >= below:
        raise ValueError(f"{name} must be less than {below:g}; got {value}")


def check_count(name: str, k: object) -> None:
    """Refuse a ``k`` that is no whole number of at least 1."""
    if isinstance(k, bool) or not isinstance(k, (numbers.Integral, torch.SymInt)) or k < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {k!r}")


def has_contents(t: Tensor) -> bool:
    """Whether a size may depend on the contents of ``t``: not while tracing, nor for fake, meta or vmapped tensors."""
    return (
        not torch.compiler.is_compiling()
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def readable(t: Tensor) -> bool:
    """Whether a check may read the contents of ``t``: not while tracing, and on a GPU only with FASTXATTN_VALIDATE=1,
    because it would wait for the device.
    """
    return has_contents(t) and (t.device.type == "cpu" or (t.is_cuda and env.validate_on_gpu))


def check_integer_tensor(name: str, t: object, dtype: torch.dtype | None = None) -> None:
    """That ``t`` is a one-axis integer tensor, of ``dtype`` when given."""
    t = check_tensor(name, t)
    if t.is_floating_point() or t.dtype == torch.bool or (dtype is not None and t.dtype != dtype):
        raise TypeError(f"{name} must be {'an integer tensor' if dtype is None else dtype}; got {t.dtype}")
    if t.ndim != 1:
        raise ValueError(f"{name} must have one axis; got shape {tuple(t.shape)}")


def check_offsets(name: str, offsets: object, rows: int) -> None:
    """That ``offsets`` are (batch + 1,) int32 and, where they may be read, cut ``rows`` rows into sequences.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: another shape, or contents as in :func:`check_contents`.
    """
    offsets = check_tensor(name, offsets)
    check_int32(name, offsets)
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (batch + 1,); got {tuple(offsets.shape)}")
    if readable(offsets):
        check_contents(name, offsets, rows, "rows of the tokens")


def check_contents(name: str, offsets: Tensor, rows: int, what: str) -> None:
    """ValueError unless offsets start at 0, never decrease and end within ``rows``, which are called ``what``."""
    if (first := int(offsets[0])) != 0:
        raise ValueError(f"{name} must start at 0; got {first}")
    lengths = offsets.long().diff()
    if lengths.numel() and int(lengths.min()) < 0:
        at = int(lengths.argmin())
        raise ValueError(
            f"{name} must not decrease; got {int(offsets[at])} then {int(offsets[at + 1])} at sequence {at}"
        )
    if (last := int(offsets[-1])) > rows:
        raise ValueError(f"{name} must end within the {rows} {what}; got {last}")
