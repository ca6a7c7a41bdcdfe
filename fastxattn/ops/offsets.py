"""Shared validation of ``cu_seqlens`` and of other one-axis integer tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastxattn.runtime import env


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


def check_dense(name: str, t: Tensor) -> None:
    """Refuse sparse, mkldnn and jagged tensors, which no kernel reads."""
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got one of {t.layout}")


def check_tensor(name: str, t: object) -> None:
    """Refuse what is no dense tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    check_dense(name, t)


def check_integer_tensor(name: str, t: object, dtype: torch.dtype | None = None) -> None:
    """That ``t`` is a one-axis integer tensor, of ``dtype`` when given."""
    check_tensor(name, t)
    assert isinstance(t, Tensor)
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
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {offsets.dtype}")
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
