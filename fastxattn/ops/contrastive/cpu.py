"""The C++ CPU kernels: what they support."""

from __future__ import annotations

import torch

from fastxattn.ops.contrastive import schema  # noqa: F401  (defines the operators)
from fastxattn.ops.contrastive.problem import Problem
from fastxattn.runtime import native


def supports(problem: Problem) -> str | None:
    """None when the kernels run this problem, else why not."""
    if problem.a.device.type != "cpu":
        return f"runs on the cpu; a is on {problem.a.device.type}"
    if torch.float64 in (problem.a.dtype, problem.scale.dtype):
        return "computes in float32; the features or the scale are float64"
    if torch.onnx.is_in_onnx_export():
        return "ONNX files hold losses as standard operators, which the reference is made of"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    return native.cpu_library().reason
