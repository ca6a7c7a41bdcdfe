"""Shared validation of numbers that operations take."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max
"""Of a number: kernels take it in float32."""
SHARE = "lie in [0, 1)", lambda share: 0 <= share < 1
"""The rule of :func:`check_number` for a share of something, less than all of it."""
POSITIVE = "be positive and finite", lambda x: 0 < x < math.inf


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
