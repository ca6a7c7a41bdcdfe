"""Dispatch: every pruning operation on the backend that runs it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastxattn.ops.pruning import (
    cpu,
    cuda,
    reference,
    schema,
)
from fastxattn.runtime.backend import Backend, Explanation, explain, resolve
from fastxattn.runtime.operators import plain


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_missing() -> str | None:
    """Why there are no Triton kernels; importing them registers them."""
    try:
        importlib.import_module("fastxattn.ops.pruning.triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None


def _triton_supports(x: Tensor) -> str | None:
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"needs tensors on a GPU; got {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; got {x.dtype}"
    reason: str | None = _triton_missing()
    return reason


BACKENDS = (
    Backend("triton", _triton_supports),
    Backend("cpu", cpu.supports),
    Backend("reference", lambda x: None),
)


def backends(name: str) -> tuple[Backend, ...]:
    """Those that have the operation, in the order in which ``auto`` tries them."""
    has_cuda = name in schema.BACKENDS["cuda"]
    return (BACKENDS[0], Backend("cuda", cuda.supports), *BACKENDS[1:]) if has_cuda else BACKENDS


def run(name: str, probe: Tensor, backend: str, *arguments: object) -> Any:
    """Operation ``name`` of :mod:`~fastxattn.ops.pruning.schema`; ``probe``'s device and dtype decide the backend."""
    chosen = implementation(name, resolve(f"pruning.{name}", backends(name), probe, backend))
    return plain(chosen, *arguments)


def explain_pruning(x: Tensor, backend: str = "auto") -> Explanation:
    """Which backend prunes tokens like ``x``, and each backend's verdict."""
    return explain("pruning", backends("select"), x, backend)


def implementation(name: str, chosen: str) -> Callable[..., Any]:
    """The operator of a compiled backend, or the function of the reference."""
    if chosen == "reference":
        return getattr(reference, name)  # type: ignore[no-any-return]
    return getattr(torch.ops.fastxattn, f"pruning_{name}_{chosen}").default  # type: ignore[no-any-return]
