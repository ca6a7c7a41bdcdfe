"""The C++ CPU kernels: what they support."""

from __future__ import annotations

import torch

from fastxattn.ops.late_interaction import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.late_interaction.problem import Problem
from fastxattn.runtime import native


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if problem.device != "cpu":
        return f"runs on the cpu; the tokens are on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32; the tokens are float64"
    if problem.smooth is not None:
        return "has no smooth maximum; triton, cuda and the reference have"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    return native.cpu_library().reason
