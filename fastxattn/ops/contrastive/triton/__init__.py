"""Triton kernels of the contrastive losses: ``kernels`` (device) and ``launch`` (host).

Importing this package imports no Triton: the kernels come with the first call.
"""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.ops.contrastive import schema
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.runtime import triton


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if (reason := triton.unavailable(problem.a.device)) is not None:
        return reason
    if torch.float64 in (problem.a.dtype, problem.scale.dtype):
        return "computes in float32; the features or the scale are float64"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold losses as standard operators, which the reference is made of"
    return None


def _register(name: str) -> None:
    def run(*arguments: Any) -> Any:
        from fastxattn.ops.contrastive.triton import launch

        return getattr(launch, name)(*arguments)

    for key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
        torch.library.impl(f"fastxattn::{name}_triton", key, run)


for _name in schema.OPERATORS:
    _register(_name)
