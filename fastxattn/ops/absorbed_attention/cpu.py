"""The C++ kernels: what they support."""

from __future__ import annotations

import torch

from fastxattn.ops.absorbed_attention.problem import Problem
from fastxattn.runtime import native


def supports(problem: Problem) -> str | None:
    """None when the CPU kernels can run ``problem``, else the reason why not."""
    if problem.device not in ("cpu", "meta"):  # on meta the operator's fake gives the shapes
        return f"runs on the CPU; the tensors are on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no {problem.dtype} arithmetic"
    if problem.bias_per_head:
        return "takes key_bias of shape (total_k,), one number for all heads"
    if torch.compiler.is_compiling():
        return None  # a tracer cannot load a library; the operator's fake does
    return native.cpu_library().reason
