"""Masks and tails of Triton kernels: in Triton's interpreter, every access that its mask lets through is looked at.

triton-viz has a sanitizer that does this; its release 3.0 does not run beside Triton 3.9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class OutOfBounds(AssertionError):
    """A kernel read or wrote outside the tensors it was given."""


@contextlib.contextmanager
def checked_accesses() -> Iterator[list[int]]:
    """Kernels launched within raise :class:`OutOfBounds`; yields the number of accesses checked, in a list of one.

    A tensor's extent is from its first to its last element. Needs ``TRITON_INTERPRET=1`` and Triton's own interpreter.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    extents = np.zeros((0, 2), dtype=np.uint64)
    checked = [0]

    def check(what: str, pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data].astype(np.uint64)
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(extents[:, 0], addresses, side="right") - 1
        inside = (place >= 0) & (addresses + size <= extents[np.maximum(place, 0), 1])
        checked[0] += addresses.size
        if not inside.all():
            raise OutOfBounds(f"a {what} of {size} bytes at {hex(int(addresses[~inside][0]))} is in no tensor given")

    def checked_launch(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal extents
        tensors = [t for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor) and t.numel()]
        spans = {(t.data_ptr(), t.data_ptr() + _bytes(t)) for t in tensors}
        extents = np.array(sorted(spans), dtype=np.uint64).reshape(-1, 2)
        extents[:, 1] = np.maximum.accumulate(extents[:, 1])  # views of one storage may overlap
        return launch(self, *arguments, **named)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor.__call__, builder.create_masked_load, builder.create_masked_store = (
        checked_launch,
        checked_load,
        checked_store,
    )
    try:
        yield checked
    finally:
        executor.__call__, builder.create_masked_load, builder.create_masked_store = launch, load, store


def _bytes(t: torch.Tensor) -> int:
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
