"""Reasons that backends share, in one wording: device, dtype, missing library, Triton version, compute capability.

Each function returns None when nothing stands in the way. An operation's ``backends.py`` adds what is its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastxattn.runtime import cuda as cuda_runtime
from fastxattn.runtime import native
from fastxattn.runtime import triton as triton_runtime


def cpu(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels do not run on these tensors. The first of them gives the device."""
    device = next(t for t in tensors if t is not None).device.type
    if device not in ("cpu", "meta"):  # on meta the operator's fake gives the shapes
        return f"the tensors are on {device}"
    if (reason := float64(*tensors)) is not None:
        return reason
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    return native.cpu_library().reason


def triton(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel runs on these tensors."""
    device = next(t for t in tensors if t is not None).device
    return triton_runtime.unavailable(device) or float64(*tensors)


def cuda(*tensors: Tensor | None) -> str | None:
    """Why no CUDA C++ kernel runs on these tensors."""
    device = next(t for t in tensors if t is not None).device
    return float64(*tensors) or cuda_runtime.unavailable(device)


def float64(*tensors: Tensor | None) -> str | None:
    """Compiled kernels accumulate in float32: not enough for float64 tensors."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "it computes in float32, and the tensors are float64"
    return None


def exported(what: str) -> str | None:
    """Operations without an ONNX node of their own are exported as the reference's standard operators."""
    if torch.onnx.is_in_onnx_export():
        return f"ONNX files hold {what} as standard operators, which the reference is made of"
    return None


def at_first_call(
    name: str,
    keys: tuple[str, ...],
    module: str,
    function: str,
    *,
    of: Callable[[Sequence[Any]], Any] | None = None,
) -> None:
    """Implement operator ``fastxattn::<name>`` by ``function`` of ``module``, imported with the first call.

    Args:
        name: of the operator.
        keys: dispatch keys; ``("CUDA", "CPU")`` for Triton, whose interpreter takes CPU tensors.
        module: importing it may need Triton or a library.
        function: takes the operator's arguments, or with ``of`` what that makes of them.
        of: ``Problem.of``, for a function that takes a problem.
    """

    def run(*arguments: Any) -> Any:
        implementation: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return implementation(*arguments) if of is None else implementation(of(arguments))

    for key in keys:
        torch.library.impl(f"fastxattn::{name}", key, run)
