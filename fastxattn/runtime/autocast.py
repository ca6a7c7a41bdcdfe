"""Autocast as the operations meet it: the dtype it asks for, arguments cast to that, and products it must not round."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts on ``device``; None where it is off."""
    kind = device.type
    # meta has no autocast to ask about; torch 2.10 does not compile is_autocast_available
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def cast(x: Any) -> Any:
    """``x`` as autocast casts the arguments of a matrix product; float64 and what is no floating tensor stay."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    dtype = autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off where it is on: arguments are cast already, and it would round the products inside too."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
