"""The Triton kernels of late interaction: what they support, and the operators they answer for."""

from __future__ import annotations

from typing import Any

import torch

from fastxattn.ops.late_interaction import schema
from fastxattn.ops.late_interaction.problem import Problem
from fastxattn.runtime import triton


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if (reason := triton.unavailable(torch.device(problem.device))) is not None:
        return reason
    if problem.dtype == torch.float64:
        return "computes in float32; the tokens are float64"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold late interaction as standard operators, which the reference is made of"
    return None


def _register(name: str) -> None:
    def run(*arguments: Any) -> Any:
        from fastxattn.ops.late_interaction import triton_kernel

        return getattr(triton_kernel, name)(*arguments)

    for key in ("CUDA", "CPU"):  # on CPU tensors: the interpreter
        torch.library.impl(f"fastxattn::{name}_triton", key, run)


for _name in schema.SMOOTH:
    _register(_name)
